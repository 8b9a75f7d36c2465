"""What is rolled up and what goes: sums stay, on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest
from fleet_world import birth, window, windows
from sqlalchemy import func, select

from edgekit.errors import UsageError
from edgekit.fleet import tables
from edgekit.fleet.retention import Keeper, Retention, read_retention, write_retention
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received

T0 = 1_790_035_200_000 // 86_400_000 * 86_400_000
HOUR, DAY = 3_600_000, 86_400_000


@pytest.fixture
def store(database_url):
    store = Store(database_url)
    yield store
    store.close()


def fill(store, *, hours: int, first_seq: int = 3) -> int:
    """A window of 10 requests each ten minutes; how many requests in all."""
    store.apply([Received(site="lab", device="pi-1", message=birth(time_ms=T0), received_ms=T0)])
    made = [window(first_seq + n, T0 + n * 600_000) for n in range(hours * 6)]
    for at in range(0, len(made), 30):
        store.apply([Received(site="lab", device="pi-1", message=windows(*made[at : at + 30]), received_ms=T0 + hours * HOUR)])
    return len(made)


def counted(store, table, step_ms=None):
    statement = select(func.sum(table.c.windows) if step_ms else func.count()).select_from(table)
    statement = statement.where(table.c.step_ms == step_ms) if step_ms else statement
    with store.read() as connection:
        return int(connection.execute(statement).scalar() or 0)


def test_windows_roll_up_and_go_and_nothing_is_counted_twice(store):
    made = fill(store, hours=48)
    now = T0 + 60 * DAY
    write_retention(store, Retention.parse("windows=30"))
    for _ in range(2):
        report = Keeper(store, now_ms=lambda: now).run_to_end()
        assert report.is_complete
        assert counted(store, tables.windows) == 0
        assert counted(store, tables.rollups, DAY) == made
        assert counted(store, tables.rollups, HOUR) == made


def test_young_windows_stay(store):
    made = fill(store, hours=48)
    Keeper(store, now_ms=lambda: T0 + 3 * DAY).run_to_end()
    assert counted(store, tables.windows) == made


def test_window_that_comes_late_is_added_once(store):
    made = fill(store, hours=24)
    now = T0 + 60 * DAY
    Keeper(store, now_ms=lambda: now).run_to_end()
    late = [window(1000, T0 + 5 * HOUR)]
    for _ in range(2):
        store.apply([Received(site="lab", device="pi-1", message=windows(*late, is_late=True), received_ms=now)])
        Keeper(store, now_ms=lambda: now).run_to_end()
    assert counted(store, tables.rollups, DAY) == made + 1


def test_message_that_comes_again_after_its_row_is_gone_is_known(store):
    fill(store, hours=24)
    Keeper(store, now_ms=lambda: T0 + 60 * DAY).run_to_end()
    before = store.duplicates
    store.apply([Received(site="lab", device="pi-1", message=windows(window(3, T0)), received_ms=T0 + 60 * DAY)])
    assert store.duplicates == before + 1


def test_setting_is_kept_and_checked(store):
    write_retention(store, Retention.parse("windows=20,events=10"))
    assert (read_retention(store).windows_days, read_retention(store).events_days) == (20, 10)
    for wrong in ("window=3", "windows=soon", "windows=-1"):
        with pytest.raises(UsageError):
            Retention.parse(wrong)
