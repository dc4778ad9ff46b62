"""Ranks as one worker: who is called, whose answer counts, and who is waited for."""

from __future__ import annotations

import asyncio
from threading import Thread

import pytest
import torch

from npd.config import RunConfig
from npd.errors import ConfigError, RunError, WorkerLostError
from npd.models.distributed import connect
from npd.runtime import CallResult
from npd.runtime.rank_group import RankGroup


class FakeRank:
    """A rank that answers, raises, or is silent until it is restarted."""

    def __init__(self, name, answer=None, error=None, is_silent=False):
        self.name, self.pid = name, None
        self.answer, self.error, self.is_silent = answer, error, is_silent
        self.calls, self.lives = [], 1
        self._ended = asyncio.Event()

    async def call(self, method, *args, timeout=None):  # noqa: ASYNC109
        self.calls.append((method, args))
        if method == "join":
            return CallResult(None, 0.0, 0.0)
        if self.is_silent:
            await self._ended.wait()
            raise WorkerLostError(f"{self.name} was restarted")
        if self.error is not None:
            raise self.error
        return CallResult(self.answer, 1.0, 2.0)

    async def restart(self):
        self.lives += 1
        self._ended.set()
        self._ended, self.is_silent, self.error = asyncio.Event(), False, None

    async def close(self):
        self._ended.set()


def drive(story):
    return asyncio.run(asyncio.wait_for(story(), 600))


def meetings(rank):
    return [args for method, args in rank.calls if method == "join"]


def test_every_rank_is_called_and_the_first_ones_answer_counts(tmp_path):
    async def story():
        ranks = [FakeRank(f"trainer-{i}", answer=i * 10) for i in range(3)]
        group = RankGroup("trainer", ranks, tmp_path / "meeting")
        assert [(await group.call("train", "segment")).value for _ in range(2)] == [0, 0]
        for index, rank in enumerate(ranks):
            assert [method for method, _ in rank.calls] == ["join", "train", "train"]
            assert meetings(rank)[0][0] == index
        assert len({meetings(rank)[0][1] for rank in ranks}) == 1, "all meet at one place"
        assert (group.name, group.pid) == ("trainer", None)

    drive(story)


def test_one_lost_rank_is_the_groups_loss_while_the_others_still_wait(tmp_path):
    async def story():
        lost = FakeRank("trainer-1", error=WorkerLostError("trainer-1 was ended by SIGKILL"))
        ranks = [FakeRank("trainer-0", is_silent=True), lost, FakeRank("trainer-2", is_silent=True)]
        group = RankGroup("trainer", ranks, tmp_path / "meeting")
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            await group.call("train", "segment")
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            await group.call("publish", 1)
        assert "publish" not in [method for method, _ in ranks[0].calls]
        await group.restart()
        assert [rank.lives for rank in ranks] == [2, 2, 2]
        await group.call("train", "segment")
        for rank in ranks:
            first, second = (meeting for _, meeting in meetings(rank))
            assert first != second, "each life meets at a new place"

    drive(story)


def test_what_survivors_say_of_a_loss_does_not_hide_it(tmp_path):
    async def story():
        broken = RunError("worker trainer-0: train() failed: connection closed by peer")
        lost = WorkerLostError("trainer-1 exited")
        ranks = [FakeRank("trainer-0", error=broken), FakeRank("trainer-1", error=lost)]
        with pytest.raises(WorkerLostError, match="trainer-1 exited"):
            await RankGroup("trainer", ranks, tmp_path / "meeting").call("train", "segment")

    drive(story)


def test_an_error_all_ranks_agree_on_leaves_the_group_whole(tmp_path):
    async def story():
        ranks = [FakeRank(f"trainer-{i}", error=RunError("not finite")) for i in range(2)]
        group = RankGroup("trainer", ranks, tmp_path / "meeting")
        with pytest.raises(RunError, match="not finite"):
            await group.call("train", "segment")
        for rank in ranks:
            rank.error = None
        await group.call("checkpoint", 3)

    drive(story)


def test_an_error_of_one_rank_is_told_though_the_others_wait(tmp_path):
    async def story():
        ranks = [
            FakeRank("trainer-0", is_silent=True),
            FakeRank("trainer-1", error=RunError("out of memory")),
        ]
        group = RankGroup("trainer", ranks, tmp_path / "meeting", grace=0.01)
        with pytest.raises(RunError, match="out of memory"):
            await group.call("train", "segment")
        with pytest.raises(WorkerLostError, match="out of memory"):
            await group.call("train", "segment")
        await group.close()

    drive(story)


SETTINGS = {
    "student": "s",
    "teacher": "t",
    "data": {"train": "p"},
    "schedule": {"steps": 5, "refresh": "never"},
    "runtime": {"kind": "local"},
    "train": {"ranks": 2},
}


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("runtime", {"kind": "inline"}, "train.ranks 2 needs a process.*runtime.kind: local"),
        ("runtime", {"device": "cuda:1"}, "train.ranks 2 needs a GPU for each.*cuda:1"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(section, values, words):
    RunConfig.model_validate(SETTINGS)
    with pytest.raises(ConfigError, match=words):
        RunConfig.model_validate({**SETTINGS, section: values})


@pytest.mark.skipif(torch.cuda.is_available(), reason="every rank finds a GPU")
def test_ranks_without_a_gpu_each_are_told_so(tmp_path):
    errors = []

    def join(rank, device):
        try:
            connect(str(tmp_path / "meeting"), rank=rank, size=2, device=device, timeout=600.0)
        except ConfigError as error:
            errors.append(str(error))

    threads = [Thread(target=join, args=(rank, "cuda")) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert all("train.ranks 2 needs a GPU for each rank" in error for error in errors)
