"""Checkpoints: any layout, whole or not there, whatever the disk and the other processes do."""

from __future__ import annotations

import itertools
import math
import os
import resource
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import emulus.train.checkpoint
from emulus.errors import EmulusError
from emulus.train.checkpoint import Checkpoints, latest
from emulus.train.parts import covered
from emulus.weights import save_tensors
from tests.ranks import run_ranks
from tests.train.faults import KILLED, Disk

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

VALUES = {"step": 7, "floats": [0.1, 1e-320, -0.0, math.pi, math.inf], "deep": {"a": [1, None, "é"]}, "big": 2**70}


def state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of all the kinds that a run has, and of awkward sizes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model.blocks.0.weight": random(5, 6),
        "model.few": random(3, 2),
        "model.half": random(9, 4).bfloat16(),
        "model.scale": random(),
        "optimizer.blocks.0.weight.step": torch.tensor(seed, dtype=torch.int64),
        "optimizer.counts": torch.arange(7) + 2**40 + seed,
        "extra.none": torch.zeros(0, 3),
        "extra.flags": torch.tensor([True, False, seed == 0]),
    }


def write_model(tensors: Mapping[str, Tensor], folder: Path) -> None:
    save_tensors(tensors, folder / "model.safetensors")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(whole(a[name]), whole(b[name])) for name in a
    )


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(folder: Path, step: int, tensors: Mapping[str, Tensor] | None = None, **options: Any) -> Checkpoints:
    """A checkpoint of a state whose seed is the step."""
    checkpoints = Checkpoints(folder, **{"keep": 5, **options})
    checkpoints.save(step, state(step) if tensors is None else tensors, {**VALUES, "step": step}, write_model, "model.")
    checkpoints.wait()
    return checkpoints


def check(path: Path, step: int) -> None:
    """It holds exactly the state of the step, in all its parts."""
    tensors = {name: torch.full_like(tensor, 1) for name, tensor in state().items()}
    assert Checkpoints(path.parent, keep=1).load(path, tensors) == {**VALUES, "step": step}
    assert same(tensors, state(step))
    model = {f"model.{name}": tensor for name, tensor in load_file(path / "model/model.safetensors").items()}
    assert same(model, {name: tensor for name, tensor in state(step).items() if name.startswith("model.")})


# One process


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path, 7)
    check(tmp_path / "step-00000007", 7)
    values = Checkpoints(tmp_path, keep=1).load(tmp_path / "step-00000007", state())
    assert [struct.pack("d", value) for value in values["floats"]] == [struct.pack("d", x) for x in VALUES["floats"]]
    files = {str(path.relative_to(tmp_path / "step-00000007")) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"COMPLETE", "trainer.json", "trainer/tensors.json", "trainer/00001.safetensors"} | {
        "model/model.safetensors"
    }


def test_the_moment_of_saving_counts(tmp_path: Path) -> None:
    """Training changes tensors and values while the thread writes."""
    tensors, values = state(1), {**VALUES, "step": 1}
    checkpoints = Checkpoints(tmp_path, keep=2)
    began, go_on = threading.Event(), threading.Event()

    def slow_write(whole: Mapping[str, Tensor], folder: Path) -> None:
        began.set()
        assert go_on.wait(10)
        write_model(whole, folder)

    checkpoints.save(1, tensors, values, slow_write, "model.")
    for tensor in tensors.values():
        tensor.zero_()
    values["deep"]["a"].append(1)
    assert began.wait(10)
    assert latest(tmp_path) is None
    go_on.set()
    checkpoints.wait()
    values["deep"]["a"].pop()
    check(tmp_path / "step-00000001", 1)
    # The copies' memory is used again, once the save before is done.
    for step in (2, 3):
        checkpoints.save(step, state(step), {**VALUES, "step": step}, write_model, "model.")
    checkpoints.wait()
    check(tmp_path / "step-00000002", 2)
    check(tmp_path / "step-00000003", 3)


def test_only_the_newest_and_every_nth_stay(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.99-a.tmp/trainer").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=3, background=False)
    for step in range(1, 9):
        checkpoints.save(step, state(step), {}, write_model, "model.")
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["3", "6", "7", "8"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, state(3))
    tensors = state()
    Checkpoints(tmp_path, keep=1).load(tmp_path / "step-00000001", tensors)
    assert same(tensors, state(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_error_of_the_thread_comes_with_the_next_call(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=2)

    def broken(tensors: Mapping[str, Tensor], folder: Path) -> None:
        raise ZeroDivisionError("a bug")

    checkpoints.save(2, state(2), {}, broken, "model.")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        checkpoints.save(3, state(3), {}, write_model, "model.")
    checkpoints.save(3, state(3), {}, write_model, "model.")
    checkpoints.wait()
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["1", "3"]


# Damage

DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path / "trainer/00001.safetensors", 300),
    "empty": lambda path: (path / "trainer/00001.safetensors").write_bytes(b""),
    "rubbish": lambda path: (path / "trainer/00001.safetensors").write_bytes(os.urandom(4000)),
    "a huge header": lambda path: (path / "trainer/00001.safetensors").write_bytes(b"\xff" * 7 + b"\x00{}"),
    "no file": lambda path: (path / "trainer/00001.safetensors").unlink(),
    "a file twice": lambda path: shutil.copy(path / "trainer/00001.safetensors", path / "trainer/00002.safetensors"),
    "no folder": lambda path: shutil.rmtree(path / "trainer"),
    "no offsets": lambda path: save_tensors(state(), path / "trainer/00002.safetensors"),
    "no values": lambda path: (path / "trainer.json").unlink(),
    "broken values": lambda path: (path / "trainer.json").write_text('{"step": '),
    "values that are a list": lambda path: (path / "trainer.json").write_text("[]"),
    "a broken index": lambda path: (path / "trainer/tensors.json").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_with_a_remedy(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    DAMAGE[damage](path)
    tensors = state(5)
    with pytest.raises(EmulusError) as caught:
        Checkpoints(tmp_path, keep=1).load(path, tensors)
    message = str(caught.value)
    assert str(path) in message
    assert "is damaged" in message
    assert "delete it to go on from the checkpoint before it" in message
    assert "\n" not in message
    assert same(tensors, state(5)), "nothing was read"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"model.more": torch.zeros(2)}), r"model\.more is missing there and float32 \[2\] here"),
        (lambda t: t.pop("model.few"), r"model\.few is float32 \[3, 2\] there and missing here"),
        (lambda t: t.update({"model.few": torch.zeros(4, 2)}), r"model\.few is float32 \[3, 2\] there and float32 \[4"),
        (lambda t: t.update({"model.few": torch.zeros(3, 2).half()}), "and float16"),
        (lambda t: t.clear(), "and 7 more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change: Callable[[dict], object], says: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    tensors = state(5)
    change(tensors)
    with pytest.raises(EmulusError, match=rf"other model or other settings .*{says}.*choose another --out"):
        Checkpoints(tmp_path, keep=1).load(tmp_path / "step-00000001", tensors)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """An array cut up at random; then some blocks may be lost, doubled, moved or changed."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    parts = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        offsets, sizes = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[axis]))
        parts.append((offsets, (*sizes[:axis], cut, *sizes[axis + 1 :])))
        start = (*offsets[:axis], offsets[axis] + cut, *offsets[axis + 1 :])
        parts.append((start, (*sizes[:axis], sizes[axis] - cut, *sizes[axis + 1 :])))
    index = draw(st.integers(0, len(parts) - 1))
    offsets, sizes = parts[index]
    match draw(st.sampled_from(["", "lost", "doubled", "moved", "changed"])):
        case "lost":
            parts.pop(index)
        case "doubled":
            parts.append(parts[draw(st.integers(0, len(parts) - 1))])
        case "moved":
            parts[index] = (tuple(start + draw(st.integers(-2, 2)) for start in offsets), sizes)
        case "changed":
            parts[index] = (offsets, tuple(max(0, size + draw(st.integers(-2, 2))) for size in sizes))
    return shape, draw(st.permutations(parts))


@given(blocks())
def test_covered_counts_every_element(case: tuple[tuple[int, ...], list]) -> None:
    shape, parts = case
    count = np.zeros(shape, int)
    inside = all(start >= 0 for offsets, _ in parts for start in offsets)
    for offsets, sizes in parts if inside else ():
        inside &= all(o + s <= size for o, s, size in zip(offsets, sizes, shape, strict=True))
        count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    assert covered(shape, parts) == (bool(parts) and inside and bool((count == 1).all()))


# Several processes


def spread(tensors: Mapping[str, Tensor], mesh: DeviceMesh | None, turn: int = 0) -> dict[str, Tensor]:
    """The same tensors, each in a layout of its own; ``turn`` makes it another one."""
    if mesh is None:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    result: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        options: list[Placement] = [Replicate(), *(Shard(axis) for axis in range(tensor.ndim))]
        layouts = list(itertools.product(options, repeat=mesh.ndim))
        layout = layouts[(len(layouts) - 1 - number - turn) % len(layouts)]
        # Every third is a plain tensor.
        plain = number % 3 == 2
        result[name] = tensor.clone() if plain else distribute_tensor(tensor, mesh, layout, src_data_rank=None)
    return result


def mesh_of_all() -> DeviceMesh | None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    return None if world == 1 else init_device_mesh("cpu", {2: (2,), 4: (2, 2)}[world])


def save_spread(folder: Path, step: int) -> None:
    save(folder, step, spread(state(step), mesh_of_all()))


def load_spread(path: Path, step: int) -> bool:
    """In every layout there is, as far as a few turns go."""
    mesh, checkpoints = mesh_of_all(), Checkpoints(path.parent, keep=1)
    for turn in range(4):
        tensors = spread({name: torch.full_like(tensor, 1) for name, tensor in state().items()}, mesh, turn)
        checkpoints.load(path, tensors)
        if not same(tensors, state(step)):
            return False
    return True


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_reads_what_any_number_wrote(world: int, tmp_path: Path) -> None:
    run_ranks(world, save_spread, tmp_path, 1)
    check(tmp_path / "step-00000001", 1)
    # What all have is written once.
    names = [name for path in tmp_path.glob("step-00000001/trainer/*.safetensors") for name in load_file(path)]
    assert names.count("model.half") == 1
    assert len(names) > len(state())
    assert all(run_ranks(6 - world, load_spread, tmp_path / "step-00000001", 1))
    save(tmp_path, 2)
    assert all(run_ranks(world, load_spread, tmp_path / "step-00000002", 2))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Of 5 rows the parts are uneven.
        self.up, self.down, self.norm = nn.Linear(6, 10, bias=False), nn.Linear(10, 5), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.up(x)))


def trained(spread_out: bool, path: Path | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module and AdamW's state after a step that every process computes alike, or what a checkpoint says."""
    torch.manual_seed(0)
    module = Tiny()
    if spread_out:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        parallelize_module(module, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(module, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number) * parameter.detach()
    optimizer.step()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    for parameter, values in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in values.items()}
    if path is not None:
        for tensor in tensors.values():
            tensor.detach().mul_(0)
        Checkpoints(path.parent, keep=1).load(path, tensors)
    return module, tensors


def save_module(folder: Path) -> None:
    save(folder, 1, trained(True, None)[1])


def load_module(path: Path) -> dict[str, np.ndarray]:
    return {name: whole(tensor.detach()).numpy() for name, tensor in trained(True, path)[1].items()}


def test_four_processes_of_fsdp_and_tensor_parallel_to_one_and_back(tmp_path: Path) -> None:
    run_ranks(4, save_module, tmp_path)
    expected, (module, loaded) = trained(False, None)[1], trained(False, tmp_path / "step-00000001")
    assert same(loaded, expected)
    assert same(dict(load_file(tmp_path / "step-00000001/model/model.safetensors")), module.state_dict())
    save(tmp_path, 2, expected)
    for back in run_ranks(4, load_module, tmp_path / "step-00000002"):
        assert same({name: torch.from_numpy(array) for name, array in back.items()}, expected)


def refused(work: Callable[[], object]) -> str:
    """What an error says."""
    with pytest.raises(EmulusError) as caught:
        work()
    return str(caught.value)


def load_damaged(path: Path) -> str:
    tensors = spread(state(5), mesh_of_all())
    message = refused(lambda: Checkpoints(path.parent, keep=1).load(path, tensors))
    assert same(tensors, state(5))
    return message


def test_a_missing_part_is_missed(tmp_path: Path) -> None:
    run_ranks(2, save_spread, tmp_path, 1)
    path = tmp_path / "step-00000001"
    (path / "trainer/00002.safetensors").unlink()
    messages = {load_damaged(path), *run_ranks(2, load_damaged, path)}
    assert len(messages) == 1
    assert "does not hold all of" in messages.pop()


def other_folders(folder: Path) -> str:
    """One path, which means another folder to each process."""
    emulus.train.checkpoint._VISIBLE_SECONDS = 0.3
    mine = folder / str(dist.get_rank())
    mine.mkdir()
    os.chdir(mine)
    return refused(lambda: save(Path("run"), 1))


def test_a_folder_that_is_not_shared_is_found_out(tmp_path: Path) -> None:
    first, second = run_ranks(2, other_folders, tmp_path)
    assert first == second
    assert "choose an --out on a file system that all machines share" in first
    assert not list((tmp_path / "0/run").iterdir())


def limited(folder: Path, rank: int, most: int, background: bool) -> tuple[str, str]:
    """One process may only write small files, which is how a full disk looks from there."""
    if dist.get_rank() == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    checkpoints = Checkpoints(folder, keep=1, background=background)
    tensors = {"model.a": torch.zeros(512), "model.b": torch.zeros(512)}

    def twice() -> None:
        for step in (2, 3):
            checkpoints.save(step, tensors, {}, write_model, "model.")
        raise AssertionError

    message = refused(twice)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(4, tensors, {}, write_model, "model.")
    checkpoints.wait()
    return message, str(latest(folder))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("rank", "most"), [(0, 1024), (0, 3072), (1, 1024)], ids=["its part", "the model", "the other"]
)
def test_a_disk_that_is_full_for_one_process_stops_all(rank: int, most: int, background: bool, tmp_path: Path) -> None:
    save(tmp_path, 1)
    first, second = run_ranks(2, limited, tmp_path, rank, most, background)
    assert first == second
    assert "could not write" in first[0]
    assert "File too large" in first[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def lose_one(folder: Path, background: bool) -> str:
    tensors = state(2)
    if dist.get_rank() == 1:
        with Disk(1, kill=True).failing():
            save(folder, 2, tensors)
    return refused(lambda: save(folder, 2, tensors, background=background))


@pytest.mark.parametrize("background", [False, True])
def test_a_process_that_is_killed_does_not_hang_the_others(background: bool, tmp_path: Path) -> None:
    save(tmp_path, 1)
    first, second = run_ranks(2, lose_one, tmp_path, background)
    assert second is None
    assert "another process of this run ended" in first
    assert latest(tmp_path) == tmp_path / "step-00000001"
    check(tmp_path / "step-00000001", 1)


# Faults at every single step


def check_after_fault(folder: Path, done: bool) -> None:
    """The checkpoint before, or the new one, never anything else; and the next save works and tidies up."""
    path = latest(folder)
    assert path is not None
    assert path.name == "step-00000002" or not done
    check(path, int(path.name[-1]))
    save(folder, 3, keep=1, background=False)
    check(folder / "step-00000003", 3)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


@Disk(0, kill=False).failing()
def kill_everywhere(folder: Path, background: bool) -> int:
    """Saves that are killed at their first, second, third ... step, until one ends."""
    status, fail_at = KILLED, 0
    while status:
        fail_at += 1
        runs = folder / str(fail_at)
        save(runs, 1, background=False)
        child = os.fork()
        if not child:
            try:
                with Disk(fail_at, kill=True).failing():
                    save(runs, 2, keep=1, background=background)
            except BaseException as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED)
        check_after_fault(runs, done=status == 0)
    return fail_at


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_step_leaves_a_whole_checkpoint(background: bool, tmp_path: Path) -> None:
    (steps,) = run_ranks(1, kill_everywhere, tmp_path, background)
    assert steps > 30


@Disk(0, kill=False).failing()
def test_a_full_disk_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for fail_at in itertools.count(1):
        runs = tmp_path / str(fail_at)
        save(runs, 1)
        error = None
        with Disk(fail_at, kill=False).failing() as disk:
            try:
                save(runs, 2, keep=1, background=fail_at % 2 == 0)
            except EmulusError as raised:
                error = raised
        assert error is None or "the disk is full" in str(error)
        check_after_fault(runs, done=error is None)
        if disk.count < fail_at:
            break
    assert fail_at > 30


def fill_up(folder: Path) -> list[str]:
    """The second process's disk is full at its first, second ... step."""
    messages = []
    for fail_at in range(1, 7):
        tensors, message = spread(state(1), mesh_of_all()), ""
        with Disk(fail_at if dist.get_rank() else 0, kill=False).failing():
            try:
                save(folder / str(fail_at), 1, tensors)
            except EmulusError as error:
                message = str(error)
        messages.append(message)
        assert (latest(folder / str(fail_at)) is None) == bool(message)
    return messages


def test_a_full_disk_at_any_step_of_another_process(tmp_path: Path) -> None:
    first, second = run_ranks(2, fill_up, tmp_path)
    assert first == second
    assert len([message for message in first if "the disk is full" in message]) == 2, "the file, and its flush"
    assert set(first[4:]) == {""}, "the process does no more than that"
