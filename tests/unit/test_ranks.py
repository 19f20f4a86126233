"""Several processes train as one does: two on this machine, over gloo, against one with the same batches."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import CLASSES
from test_train import LABELS, Killed, killed_at, nothing, stage, teacher, views
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from edgekd.distillers import methods
from edgekd.errors import StorageError, TrainingDivergedError
from edgekd.ranks import ALONE, Ranks, join
from edgekd.train import Stage, fit, load_checkpoint
from edgekd.views import CachedTeacher

pytestmark = pytest.mark.backends
PROCESSES = 2


def without_statistics() -> nn.Module:
    """No batch norm, whose statistics are of a process's own part of a batch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(CLASSES)))


def trained(made: Stage) -> dict[str, Any]:
    return {"history": fit(made, nothing), "weights": made.model.state_dict()}


def shared(ranks: Ranks, asked: list[int]) -> dict[str, Any]:
    """A training whose teacher counts the images that this process shows it."""

    def counting(inputs: Tensor) -> Tensor:
        asked.append(len(inputs))
        return teacher(inputs)

    seen = views()
    taught = CachedTeacher(counting, seen, batch_size=16, ranks=ranks)
    return trained(stage(model=without_statistics(), views=seen, teacher=taught, ranks=ranks))


def merged(ranks: Ranks) -> dict[str, Tensor]:
    """A store with a row a sample, of which each process wrote one, and statistics of all."""
    rows, statistics = torch.full((4, 2), -torch.inf), torch.ones(3)
    before = [rows.clone(), statistics.clone()]
    rows[ranks.rank], statistics[:2] = ranks.rank, ranks.rank + 2.0
    ranks.merge([rows, statistics], before)
    return {"rows": rows, "statistics": statistics}


def diverged(ranks: Ranks) -> str:
    """What a process says when the logits of the other one's samples are broken."""
    seen = views()
    broken = torch.nan if ranks.rank else 1.0
    taught = CachedTeacher(lambda x: teacher(x) * broken, seen, batch_size=16, ranks=ranks)
    try:
        fit(stage(views=seen, teacher=taught, ranks=ranks), nothing)
    except TrainingDivergedError as error:
        return error.message
    return ""


def process(rank: int, port: int, folder: Path) -> None:
    """One of the processes; what it finds goes into a file of its own."""
    place = {"RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    ranks, asked = join(cuda=False), list[int]()
    found: dict[str, Any] = {"exact": shared(ranks, asked), "asked": sum(asked), "merged": merged(ranks)}
    found["statistics"] = trained(stage(ranks=ranks, batch_size=20))
    found["taid"] = trained(stage(model=without_statistics(), distillers=methods("taid"), ranks=ranks))
    found["diverged"] = diverged(ranks)
    found["agreed"] = (ranks.of_first(rank), ranks.all(rank == 0), ranks.collect([rank, rank + 2]))
    with pytest.raises(Killed):
        fit(stage(folder / "c.pt", model=without_statistics(), ranks=ranks), killed_at(8))
    own = folder / ("c.pt" if ranks.first else "elsewhere.pt")
    with pytest.raises(StorageError) as caught:
        fit(stage(own, model=without_statistics(), ranks=ranks), nothing)
    found["elsewhere"] = caught.value.message
    ranks.leave()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(process, (port, folder), nprocs=PROCESSES)
    made = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    return [each | {"folder": folder} for each in made]


def losses(history: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in history]


@pytest.mark.parametrize(("kind", "method"), [("exact", "kd"), ("taid", "taid")])
def test_two_processes_train_like_one(found: list[dict[str, Any]], kind: str, method: str) -> None:
    """Batches of 21 are parts of 11 and 10. TAID also reads the loss after each step."""
    alone = trained(stage(model=without_statistics(), distillers=methods(method)))
    assert losses(found[0][kind]["history"]) == pytest.approx(losses(alone["history"]), rel=1e-5)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found[0][kind]["weights"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "statistics", "taid"])
def test_all_processes_end_with_the_same_bits(found: list[dict[str, Any]], kind: str) -> None:
    first, second = (each[kind] for each in found)
    assert first["history"] == second["history"]
    for name, value in first["weights"].items():
        assert torch.equal(second["weights"][name], value), name


def test_batch_norm_sees_parts_of_a_batch_and_keeps_mean_statistics(found: list[dict[str, Any]]) -> None:
    alone = trained(stage(batch_size=20))
    assert losses(found[0]["statistics"]["history"]) == pytest.approx(losses(alone["history"]), rel=0.05)
    means = {name: value for name, value in alone["weights"].items() if name.endswith("running_mean")}
    for name, value in means.items():
        torch.testing.assert_close(found[0]["statistics"]["weights"][name], value, rtol=0.1, atol=0.05)


def test_each_image_is_shown_to_the_teacher_by_one_process(found: list[dict[str, Any]]) -> None:
    assert [each["asked"] for each in found] == [64, 64]  # two views of 64 in four batches


def test_what_one_process_wrote_is_kept_and_what_all_wrote_is_averaged(found: list[dict[str, Any]]) -> None:
    for each in found:
        rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-torch.inf] * 2, [-torch.inf] * 2])
        assert torch.equal(each["merged"]["rows"], rows)
        assert each["merged"]["statistics"].tolist() == [2.5, 2.5, 1.0]


def test_all_processes_stop_at_a_loss_that_one_of_them_spoils(found: list[dict[str, Any]]) -> None:
    assert "the loss became nan at step 1 (epoch 1), in the term of: kd" in found[0]["diverged"]
    assert found[1]["diverged"] == found[0]["diverged"]


def test_processes_agree(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["agreed"] == (0, False, [0, 1, 2, 3])


def test_one_process_goes_on_where_two_were_killed(found: list[dict[str, Any]]) -> None:
    path = found[0]["folder"] / "c.pt"
    stored = load_checkpoint(path)
    assert stored is not None
    assert len(stored["history"]) == 2
    resumed = trained(stage(path, model=without_statistics()))
    alone = trained(stage(model=without_statistics()))
    assert losses(resumed["history"]) == pytest.approx(losses(alone["history"]), rel=1e-5)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_processes_that_see_different_checkpoints_say_so(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "the processes find different checkpoints" in each["elsewhere"]


def test_one_process_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert join(cuda=False) is ALONE
    assert (ALONE.of_first("x"), ALONE.all(False), ALONE.collect([1, 2])) == ("x", False, [1, 2])
    assert LABELS[ALONE.part(64)].equal(LABELS)
    assert not ALONE.called()
    with ALONE.dismissed():
        ALONE.call()
    ALONE.leave()
