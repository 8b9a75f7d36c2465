"""``edgekit fleet db``: the fleet's database itself: schema, backup, what is kept."""

from __future__ import annotations

from pathlib import Path

import typer

from edgekit.cli.console import format_bytes, note, out, out_json, table

app = typer.Typer(
    help="The fleet's database: upgrade its schema, back it up, restore it, say what is kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DATABASE = typer.Option("edgekit-fleet.db", "--db", help="SQLite file, or a SQLAlchemy URL.")
JSON = typer.Option(False, "--json", help="Print the records as JSON.")


def _check_there(database: str) -> None:
    from edgekit.errors import UsageError

    if "://" not in database and not Path(database).is_file():
        raise UsageError("fleet.database", f"{database}: no such file.", hint="Give the --db of edgekit fleet serve.")


@app.command()
def status(database: str = DATABASE, json: bool = JSON) -> None:
    """Which schema a database has, and what would be upgraded. Exit code 1 when there is something to upgrade."""
    from edgekit.fleet.database import make_engine
    from edgekit.fleet.migrations.upgrading import read_status

    _check_there(database)
    engine = make_engine(database)
    try:
        with engine.connect() as connection:
            found = read_status(connection)
    finally:
        engine.dispose()
    if json:
        out_json(found)
    else:
        pending = ", ".join(found.pending) or "nothing"
        out(f"schema {found.revision or 'none yet'}, newest {found.newest}; to upgrade: {pending}")
    if found.pending:
        raise typer.Exit(1)


@app.command()
def upgrade(database: str = DATABASE) -> None:
    """Bring a database to this edgekit's schema, in one transaction; "fleet serve" does the same when it starts."""
    from edgekit.fleet.store import Store

    _check_there(database)
    Store(database).close()
    out("the schema is this edgekit's")


@app.command()
def backup(file: Path = typer.Argument(..., metavar="FILE"), database: str = DATABASE) -> None:
    """Copy the database into a new file while the server goes on; PostgreSQL by pg_dump."""
    from edgekit.fleet.backup import back_up

    size = back_up(database, file)
    out(f"{file}: {format_bytes(size)}")


@app.command()
def restore(file: Path = typer.Argument(..., metavar="FILE"), database: str = DATABASE) -> None:
    """Put a backup into a database that is empty or not there yet."""
    from edgekit.fleet import backup as copies

    copies.restore(file, database)
    out("restored")


@app.command()
def prune(
    keep: str = typer.Option("", "--keep", metavar="DAYS", help="Set days by class: windows=14,events=400; 0 is for ever."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show what is kept for how long, and delete nothing."),
    database: str = DATABASE,
    json: bool = JSON,
) -> None:
    """Roll windows up to minutes, hours and days, and delete what is older than its class's time."""
    import msgspec

    from edgekit.fleet.retention import Keeper, Retention, read_retention, write_retention
    from edgekit.fleet.store import Store

    _check_there(database)
    store = Store(database)
    try:
        kept = Retention.parse(keep, read_retention(store)) if keep else read_retention(store)
        if dry_run:
            days = {name.removesuffix("_days"): value for name, value in msgspec.structs.asdict(kept).items()}
            if json:
                out_json(days)
                return
            out(
                table(
                    ["class", "days"], [[name, str(value) if value else "for ever"] for name, value in days.items()], right=[1]
                )
            )
            return
        if keep:
            write_retention(store, kept)
        report = Keeper(store).run_to_end()
    finally:
        store.close()
    if json:
        out_json(report)
        return
    out(f"{report.rolled_hours} hours rolled up")
    for name, count in sorted(report.deleted.items()):
        if count:
            out(f"{count} rows of {name} deleted")
    note("A running server does this by itself every two minutes.", "dim")
