"""Pruning and distillation: aligned channels, fewer MACs, kept weights, resume, determinism."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import SmallTask, make_batch, make_context, make_net, source_model
from torch import Tensor, nn

from edgekit.compiler.passes.on_torch.distillation import DistillationSettings, distillation_loss, reestimate_statistics
from edgekit.compiler.passes.on_torch.kept import digest_state
from edgekit.compiler.passes.on_torch.prune_distill import PruneAndDistill
from edgekit.compiler.passes.on_torch.pruning import (
    PruningSettings,
    Removal,
    apply_plan,
    count_macs,
    is_prunable,
    measure_importance,
    plan_pruning,
    widths_of,
)
from edgekit.errors import ArtifactError, DataError

EXAMPLE = (torch.zeros(1, 1, 8, 8),)
EPOCHS = {"fast": 1, "default": 3, "max": 4}


def make_pass() -> PruneAndDistill:
    return PruneAndDistill(epochs=EPOCHS)


def flat_importance(net: nn.Module) -> dict[str, list[float]]:
    return {name: [float(index) for index in range(width)] for name, width in widths_of(net).items()}


def same_state(left: nn.Module, right: nn.Module) -> bool:
    return digest_state(left) == digest_state(right)


@given(multiple=st.sampled_from([2, 4, 8]), goal=st.floats(0.1, 0.95), least=st.sampled_from([0.25, 0.5, 0.75]))
@settings(max_examples=12, deadline=None)
def test_plan_keeps_multiples_and_limits(multiple, goal, least):
    net = make_net()
    asked = PruningSettings(channel_multiple=multiple, macs_goal=goal, least_share=least)
    plan = plan_pruning(net, EXAMPLE, flat_importance(net), asked)
    pruned = apply_plan(net, EXAMPLE, plan)
    before, after = widths_of(net), widths_of(pruned)
    assert after["head"] == before["head"]
    for name in set(before) - {"head"}:
        assert after[name] % multiple == 0
        assert after[name] >= least * before[name]
    assert (count_macs(pruned, EXAMPLE) < count_macs(net, EXAMPLE)) == bool(plan)
    with torch.no_grad():
        assert pruned(torch.randn(3, 1, 8, 8)).shape == (3, 4)


def test_plan_takes_the_least_important_channels():
    net = make_net()
    importance = {name: [1.0] * width for name, width in widths_of(net).items()}
    for name in ("wide.0", "inner.0"):
        importance[name] = [0.0 if index in {1, 3, 5, 7, 9, 11, 13, 15} else 1.0 for index in range(len(importance[name]))]
    plan = plan_pruning(net, EXAMPLE, importance, PruningSettings(channel_multiple=8, macs_goal=0.7))
    assert {part.layer for part in plan} <= {"wide.0", "inner.0"}
    assert all(part.channels == (1, 3, 5, 7, 9, 11, 13, 15) for part in plan)


def test_pruning_silent_channels_changes_nothing():
    """A channel that is always zero may leave without any change of the output: the surgery itself is exact."""
    net = make_net()
    with torch.no_grad():
        for channel in range(4, 12):
            net.inner[1].weight[channel] = 0
            net.inner[1].bias[channel] = 0
            net.inner[1].running_mean[channel] = 0
    pruned = apply_plan(net, EXAMPLE, (Removal(layer="inner.0", channels=tuple(range(4, 12)), of=16),))
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), net(x), rtol=0, atol=1e-5)


def test_importance_sees_a_dead_channel():
    net = make_net()
    with torch.no_grad():
        net.inner[1].weight[5] = 0
        net.inner[1].bias[5] = 0
    scores = measure_importance(net, EXAMPLE, SmallTask(), PruningSettings(channel_multiple=8), seed=0)["inner.0"]
    assert min(range(16), key=scores.__getitem__) == 5
    assert all(parameter.grad is None for parameter in net.parameters())


class Stubborn(nn.Module):
    """Hard-codes its width: removing channels breaks the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.ones(32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(-1, 4, 8).reshape(-1, 32))


def test_group_that_breaks_the_model_is_left_alone():
    net, example = Stubborn().eval(), (torch.zeros(2, 8),)
    assert not is_prunable(net, example, PruningSettings(channel_multiple=8))
    assert plan_pruning(net, example, flat_importance(net), PruningSettings(channel_multiple=8)) == ()


def test_narrow_network_is_not_applicable(tmp_path):
    context = make_context(tmp_path, task=SmallTask(), multiple=32)
    assert "lose 32 channels" in (make_pass().find_obstacle(source_model(tmp_path), context) or "")
    with pytest.raises(ArtifactError) as caught:
        make_pass().run(source_model(tmp_path), context)
    assert caught.value.code == "pruning.nothing_to_remove"


def test_plan_of_another_parent_is_refused():
    with pytest.raises(ArtifactError) as caught:
        apply_plan(make_net(), EXAMPLE, (Removal(layer="inner.0", channels=(0,), of=99),))
    assert caught.value.code == "pruning.plan_mismatch"


def test_distillation_loss_is_zero_for_the_teacher_itself():
    task, logits, labels = SmallTask(), torch.randn(6, 4), torch.randint(0, 4, (6,))
    only_teacher = DistillationSettings(epochs=1, weight=1.0)
    assert float(distillation_loss(logits, logits, labels, task, only_teacher)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(logits * 0, logits, labels, task, only_teacher)) > 0.01
    values = torch.randn(6, 3, 2)
    assert float(distillation_loss(values, values + 1, values, task, only_teacher)) == pytest.approx(1, rel=1e-5)


def test_reestimated_statistics_are_the_data_s():
    task = SmallTask(batches=3)
    net = nn.Sequential(nn.BatchNorm2d(1)).eval()
    reestimate_statistics(net, task, DistillationSettings(epochs=1), seed=0)
    means = [batch[0].mean().item() for batch, _ in task.train_batches(0, 0)]
    assert net[0].running_mean.item() == pytest.approx(np.mean(means), rel=1e-5)
    assert net[0].momentum == 0.1
    assert not net.training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One whole run, its task and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    task = SmallTask(folder / "kept")
    lines: list[str] = []
    context = make_context(folder / "work", task=task, on_progress=lambda text, _done: lines.append(text))
    assert make_pass().find_obstacle(source_model(folder), context) is None
    return folder, task, make_pass().run(source_model(folder), context), lines


def test_student_is_smaller_aligned_and_runs(trained):
    _, _, model, lines = trained
    parent = make_net()
    assert count_macs(model.module, EXAMPLE) < 0.6 * count_macs(parent, EXAMPLE)
    assert all(width % 8 == 0 for name, width in widths_of(model.module).items() if name != "head")
    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "picture"
    images, _ = make_batch(torch.Generator().manual_seed(1), 8)
    with torch.no_grad():
        expected = model.module(images).numpy()
    np.testing.assert_allclose(session.run(None, {"picture": images.numpy()})[0], expected, atol=1e-4)
    assert any("left" in line for line in lines)


def test_training_learns(trained):
    folder, _, model, _ = trained
    record = json.loads(next((folder / "kept").glob("*.json")).read_text())
    assert record["training"]["losses"][-1] < record["training"]["losses"][0]
    assert model.lineage[-1].settings["epochs"] == 3
    assert any(note.startswith("weights trained in this run") for note in model.lineage[-1].notes)


def test_kept_weights_are_reused_without_data(trained, tmp_path):
    folder, _, first, _ = trained
    task = SmallTask(folder / "kept")
    task.has_data = False
    context = make_context(tmp_path, task=task)
    assert make_pass().find_obstacle(source_model(tmp_path), context) is None
    again = make_pass().run(source_model(tmp_path), context)
    assert task.epochs_started == []
    assert same_state(again.module, first.module)
    assert again.path.read_bytes() == first.path.read_bytes()
    key = next((folder / "kept").glob("*.json")).stem
    assert again.lineage[-1].notes[0] == f"weights trained earlier, kept under {key}"


def test_kept_weights_of_more_effort_serve_less(trained, tmp_path):
    folder, _, first, _ = trained
    task = SmallTask(folder / "kept")
    again = make_pass().run(source_model(tmp_path), make_context(tmp_path, task=task, effort="fast"))
    assert task.epochs_started == []
    assert same_state(again.module, first.module)


@pytest.mark.parametrize("change", ["multiple", "seed", "effort", "parent", "data"])
def test_key_depends_on_what_decides(trained, tmp_path, change):
    folder, _, _, _ = trained
    task = SmallTask(folder / "kept")
    task.has_data = False
    model, context = source_model(tmp_path), make_context(tmp_path, task=task)
    match change:
        case "multiple":
            context = make_context(tmp_path, task=task, multiple=4)
        case "seed":
            context = make_context(tmp_path, task=task, seed=1)
        case "effort":
            context = make_context(tmp_path, task=task, effort="max")
        case "parent":
            model = source_model(tmp_path, make_net(seed=4))
        case _:
            task.data_digest = "sha256:" + "9" * 64
    assert "needs training data" in (make_pass().find_obstacle(model, context) or "")
    with pytest.raises(DataError):
        make_pass().run(model, context)


def test_training_interrupted_goes_on_to_the_same_weights(trained, tmp_path):
    _, _, whole, _ = trained
    task = SmallTask(tmp_path / "kept")
    task.interrupt_at = 2
    context = make_context(tmp_path / "work", task=task)
    with pytest.raises(KeyboardInterrupt):
        make_pass().run(source_model(tmp_path), context)
    assert not (tmp_path / "kept").exists()
    assert len(list((tmp_path / "work").glob("*.checkpoint"))) == 1
    task.interrupt_at, task.epochs_started = None, []
    resumed = make_pass().run(source_model(tmp_path), context)
    assert 1 not in task.epochs_started
    assert 2 in task.epochs_started
    assert same_state(resumed.module, whole.module)
    assert not list((tmp_path / "work").glob("*.checkpoint"))


def test_checkpoint_damaged_starts_anew(trained, tmp_path):
    folder, _, whole, _ = trained
    key = next((folder / "kept").glob("*.json")).stem
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / f"{key}.checkpoint").write_bytes(b"not a checkpoint")
    result = make_pass().run(source_model(tmp_path), make_context(tmp_path / "work", task=SmallTask(None)))
    assert same_state(result.module, whole.module)


def test_kept_weights_flipped_byte_is_refused(trained, tmp_path):
    folder, _, _, _ = trained
    task = SmallTask(tmp_path / "kept")
    task.trained_dir.mkdir()
    for path in (folder / "kept").iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".pt":
            data[len(data) // 2] ^= 1
        (task.trained_dir / path.name).write_bytes(bytes(data))
    with pytest.raises(ArtifactError) as caught:
        make_pass().run(source_model(tmp_path), make_context(tmp_path, task=task))
    assert caught.value.code == "weights.digest_mismatch"


def test_trained_dir_not_writable_keeps_in_the_run(trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    task = SmallTask(tmp_path / "file" / "kept")
    result = make_pass().run(source_model(tmp_path), make_context(tmp_path / "work", task=task))
    assert "in the run's folder" in result.lineage[-1].notes[0]
    assert len(list((tmp_path / "work" / "trained").glob("*.pt"))) == 1


def test_no_task_or_no_module_says_why(tmp_path):
    model = source_model(tmp_path)
    assert "TrainTask" in (make_pass().find_obstacle(model, make_context(tmp_path)) or "")
    file_only = type(model)(path=model.path, format="onnx", precision="fp32", lineage=())
    assert "torch source" in (make_pass().find_obstacle(file_only, make_context(tmp_path, task=SmallTask())) or "")


def test_frozen_parent_gives_a_trained_student(tmp_path):
    parent = make_net().requires_grad_(False)
    model = make_pass().run(source_model(tmp_path, parent), make_context(tmp_path, task=SmallTask(), effort="fast"))
    record = json.loads(next((tmp_path / "trained").glob("*.json")).read_text())
    plan = tuple(Removal(layer=p["layer"], channels=tuple(p["channels"]), of=p["of"]) for p in record["plan"])
    assert not same_state(model.module, apply_plan(parent, EXAMPLE, plan))
    assert not any(parameter.requires_grad for parameter in parent.parameters())


def test_untraceable_model_is_an_obstacle(tmp_path):
    net = make_net()
    context = make_context(tmp_path, task=SmallTask(), example_inputs=(torch.zeros(1, 3, 8, 8),))
    assert "cannot trace" in (make_pass().find_obstacle(source_model(tmp_path, net), context) or "")


@pytest.mark.parametrize(("scale", "code"), [(float("nan"), "training.diverged"), (None, "training.failed")])
def test_training_that_fails_names_the_task(tmp_path, scale, code):
    class Broken(SmallTask):
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().loss(outputs, labels) * scale

    with pytest.raises(ArtifactError) as caught:
        make_pass().run(source_model(tmp_path), make_context(tmp_path, task=Broken()))
    assert caught.value.code == code


def test_caller_s_random_state_is_untouched(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parent = make_net()
    digest = digest_state(parent)
    make_pass().run(source_model(tmp_path, parent), make_context(tmp_path, task=SmallTask(), effort="fast"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert digest_state(parent) == digest
