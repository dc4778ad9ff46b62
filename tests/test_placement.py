"""Which process gets which GPU, and what that takes of each: over machines that are not here."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npd.config import RunConfig
from npd.control.devices.defaults import check_servers, chosen, with_defaults
from npd.control.devices.memory import Gpu, gpus_here, parse_gpus, process_names
from npd.control.devices.placement import assign_gpus, check_gpus, start_generators, start_trainer
from npd.doctor.memory import memory_checks
from npd.errors import ConfigError, InputError
from npd.models.metadata import GIB, size_of
from npd.store.layout import RunLayout
from open_runs import open_run
from test_score_ranks import FakeRuntime

# Of Qwen2.5: hidden, intermediate, layers, heads, keys' heads, vocabulary, parameters.
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151_936, 494_032_768),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936, 1_543_714_304),
    "7b": (3584, 18_944, 28, 28, 4, 152_064, 7_615_616_512),
}


PHASES, TOGETHER = ({"kind": "local", "share": share} for share in ("phases", "together"))


def make(ranks=1, scorers=1, score_ranks=1, generators=1, kind="local", device="auto", **sections):
    """A config with as many processes; sections are merged in."""
    values = {
        "student": "s", "teacher": "t", "schedule": {"epochs": 10},
        "train": {"ranks": ranks}, "score": {"workers": scorers, "ranks": score_ranks},
        "generate": {"workers": generators}, "runtime": {"kind": kind, "device": device},
    }  # fmt: skip
    for name, section in sections.items():
        is_section = isinstance(values.get(name), dict)
        values[name] = {**values[name], **section} if is_section else section
    return RunConfig.model_validate(values)


def placed(config, count):
    return assign_gpus(config, [str(index) for index in range(count)])


@pytest.mark.parametrize(
    ("settings", "count", "expected"),
    [
        # One GPU is shared; of two the trainer has one, and teacher and snapshot the other.
        ({}, 1, "trainer 0, scorer-0 0, generator-0 0"),
        ({}, 2, "trainer 0, scorer-0 1, generator-0 1"),
        ({}, 4, "trainer 0, scorer-0 1, generator-0 2"),
        ({"generators": 4}, 4,
         "trainer 0, scorer-0 1, generator-0 2, generator-1 3, generator-2 1, generator-3 2"),
        ({"ranks": 4, "scorers": 2, "generators": 2}, 8,
         "trainer-0 0, trainer-1 1, trainer-2 2, trainer-3 3, scorer-0 4, scorer-1 5, "
         "generator-0 6, generator-1 7"),
        # No GPU is left by the trainer.
        ({"ranks": 2}, 2, "trainer-0 0, trainer-1 1, scorer-0 0, generator-0 1"),
        # A teacher over two GPUs shares neither with the trainer.
        ({"score_ranks": 2}, 4, "trainer 0, scorer-0-0 1, scorer-0-1 2, generator-0 3"),
        ({"score_ranks": 2}, 2, "trainer 0, scorer-0-0 1, scorer-0-1 , generator-0 1"),
        ({"ranks": 2}, 1, "trainer-0 0, trainer-1 , scorer-0 0, generator-0 0"),
        # Chosen by the config.
        ({"score": {"gpus": [0]}, "generate": {"gpus": [0]}}, 2,
         "trainer 1, scorer-0 0, generator-0 0"),
        ({"train": {"gpus": [3]}}, 4, "trainer 3, scorer-0 0, generator-0 1"),
        ({"scorers": 3, "score": {"gpus": [1, 2]}}, 4,
         "trainer 0, scorer-0 1, scorer-1 2, scorer-2 1, generator-0 3"),
        # Who computes nothing needs none; a server that npd starts is where its worker is.
        ({"generate": {"source": "dataset"}, "schedule": {"refresh": "never"}}, 2,
         "trainer 0, scorer-0 1"),
        ({"generate": {"engine": "vllm", "urls": ["http://a:1"]}}, 2, "trainer 0, scorer-0 1"),
        ({"generate": {"engine": "vllm", "launch": {"venv": "v"}}}, 3,
         "trainer 0, scorer-0 1, generator-0 2"),
        ({"generate": {"engine": "vllm", "launch": {"venv": "v", "tensor_parallel": 2}}}, 4,
         "trainer 0, scorer-0 1, generator-0 2,3"),
        # One over more GPUs than are left has the trainer's too; than there are, is left to itself.
        ({"generate": {"engine": "vllm", "launch": {"venv": "v", "tensor_parallel": 2}}}, 2,
         "trainer 0, scorer-0 1, generator-0 0,1"),
        ({"generate": {"engine": "vllm", "launch": {
            "venv": "v", "args": ["--pipeline-parallel-size", "2"]}}}, 3,
         "trainer 0, scorer-0 1, generator-0 1,2"),
        ({"generate": {"engine": "vllm", "launch": {"venv": "v", "tensor_parallel": 4}}}, 2,
         "trainer 0, scorer-0 1"),
        # Nobody is put on a GPU that the config gives to a server.
        ({"generate": {"engine": "vllm", "launch": {"venv": "v", "gpus": ["5"]}}}, 3,
         "trainer 0, scorer-0 1"),
        ({"generators": 2, "generate": {"engine": "vllm", "launch": {
            "venv": "v", "gpus": ["1", "2"]}}}, 3, "trainer 0, scorer-0 0"),
        ({"generate": {"engine": "vllm", "launch": {"venv": "v", "gpus": ["0,1"]}}}, 4,
         "trainer 2, scorer-0 3"),
        # Trainer's ranks come before what others reserved.
        ({"ranks": 2, "score": {"gpus": [1]}}, 2,
         "trainer-0 0, trainer-1 1, scorer-0 1, generator-0 0"),
        # The cluster, a device that is named, threads of one process: nothing to assign.
        ({"kind": "ray", "runtime": {"ray": {"address": "auto"}}}, 4, ""),
        ({"device": "cuda:1"}, 4, ""),
        ({"kind": "inline"}, 4, ""),
        ({}, 0, ""),
    ],
)  # fmt: skip
def test_each_process_has_its_gpu(settings, count, expected):
    found = placed(make(**settings), count)
    assert ", ".join(f"{name} {gpus}" for name, gpus in found.items()) == expected


@given(
    *(st.integers(1, 4) for _ in range(4)),
    st.integers(1, 12),
)
def test_gpus_are_shared_only_if_there_are_too_few(train, scorers, score_ranks, generators, count):
    config = make(train, scorers, score_ranks, generators)
    found = placed(config, count)
    names = process_names(config)
    assert sorted(found) == sorted(names)
    needed = len(names)
    if count >= needed:
        assert len({*found.values()}) == needed, "each has its own"
    trainers = [found[name] for name in names if name.startswith("trainer") and found[name]]
    assert trainers == [str(index) for index in range(min(train, count))]
    others = {found[name] for name in names if not name.startswith("trainer")}
    if count > train:
        assert others.isdisjoint(trainers), "the trainer's are shared last"
    ranks = [found[name] for name in names if "scorer" in name and score_ranks > 1 and found[name]]
    assert len({*ranks}) == len(ranks)


def test_a_server_is_known_by_the_beginning_of_its_gpus_id():
    launch = {"engine": "vllm", "launch": {"venv": "v", "gpus": ["GPU-bb"]}}
    found = assign_gpus(make(generate=launch), ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"])
    assert found == {"trainer": "GPU-aaaa", "scorer-0": "GPU-cccc"}


@pytest.fixture
def sees(monkeypatch):
    """Make this process see GPUs that are not there: the names it is told, and how many."""

    def set_gpus(names, count):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        monkeypatch.setattr("npd.control.devices.placement.num_gpus", lambda *_: count)

    return set_gpus


def test_workers_see_what_they_are_given(tmp_path, sees):
    """Names and ids of CUDA_VISIBLE_DEVICES are kept, and `auto` is no CPU in a worker."""
    sees("GPU-aaaa, 7", 2)
    runtime = FakeRuntime()
    run = open_run(make(), RunLayout(tmp_path))
    start_trainer(run, runtime)
    start_generators(run, runtime)
    seen = {name: env["CUDA_VISIBLE_DEVICES"] for name, (_, env) in runtime.spawned.items()}
    assert seen == {"trainer": "GPU-aaaa", "generator-0": "7"}
    assert {factory.config.runtime.device for factory in runtime.factories} == {"cuda"}
    on_cpu = FakeRuntime()
    start_trainer(open_run(make(device="cpu"), RunLayout(tmp_path)), on_cpu)
    assert on_cpu.spawned["trainer"][1] == {}
    assert on_cpu.factories[0].config.runtime.device == "cpu"


def test_more_names_than_gpus_are_not_given_out(tmp_path, sees):
    """CUDA ignores names from the first wrong one on; a worker with such a name had none."""
    sees("0,1,2,3", 1)
    runtime = FakeRuntime()
    start_generators(open_run(make(generators=3), RunLayout(tmp_path)), runtime)
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in runtime.spawned.values()} == {"0"}


@pytest.mark.parametrize(
    ("settings", "count", "says"),
    [
        ({"score": {"gpus": [2]}}, 2, "score.gpus names GPU 2, but npd sees 2 GPUs, numbered from"),
        ({"train": {"gpus": [0]}}, 0, "train.gpus names GPU 0, but npd sees none: correct it"),
        (
            {"ranks": 2},
            1,
            "train.ranks: each rank takes a GPU of its own, npd sees 1, and trainer-1",
        ),
        ({"score_ranks": 2}, 2, "score.ranks: .* and scorer-0-1 gets none: lower score.ranks"),
        ({"score_ranks": 2, "scorers": 2}, 4, "and scorer-1-1 gets none: lower score.ranks or"),
        ({"ranks": 2, "score_ranks": 2, "scorers": 2}, 5, "and scorer-1-1 gets none"),
        ({"ranks": 2, "score_ranks": 2, "scorers": 2}, 6, None),
        ({"score": {"gpus": [0, 1]}}, 2, None),
        ({"ranks": 2}, 2, None),
        ({"ranks": 4, "kind": "ray", "runtime": {"ray": {"address": "a"}}}, 1, None),
        ({"ranks": 4, "device": "cpu"}, 1, None),
    ],
)
def test_a_gpu_that_is_missing_is_named(settings, count, says):
    config, gpus = make(**settings), [str(index) for index in range(count)]
    if says is None:
        assert check_gpus(config, gpus)
    else:
        with pytest.raises(ConfigError, match=says):
            check_gpus(config, gpus)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"ranks": 2, "train": {"gpus": [1]}},
            "train.ranks 2 needs 2 GPUs, one for each rank, but",
        ),
        ({"score_ranks": 2, "scorers": 2, "score": {"gpus": [2, 3]}}, "score.ranks 2 needs 4 GPUs"),
    ],
)
def test_too_few_gpus_are_named_for_ranks(settings, says):
    with pytest.raises(ConfigError, match=says):
        make(**settings)
    make(**settings, kind="ray", runtime={"ray": {"address": "a"}})


# What it takes of each GPU.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of models that are headers only: sizes are read, weights never."""
    folder = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        hidden, intermediate, layers, heads, keys, vocabulary, parameters = shape
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({
            "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys, "vocab_size": vocabulary}))  # fmt: skip
        header = {
            "all": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 2 * parameters]}
        }
        text = json.dumps(header).encode()
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 2 * parameters)  # a hole: it takes no disk
    return folder


def forecast(models, machine, student="1.5b", teacher="7b", **settings):
    config = make(student=str(models / student), teacher=str(models / teacher), **settings)
    return list(memory_checks(config, parse_gpus(machine)))


@pytest.mark.parametrize(
    ("machine", "settings", "statuses"),
    [
        # 1.5B and 7B on one card: a full row of the default is a warning, since rows are split.
        ("1x80GB", {"train": {"activation_checkpointing": False}}, ["warn"]),
        ("1x80GB", {"train": {"activation_checkpointing": True}}, ["ok"]),
        ("2x80GB", {"train": {"activation_checkpointing": True}}, ["ok", "ok"]),
        ("8x80GB", {"train": {"activation_checkpointing": True}}, ["ok", "ok", "ok"]),
        ("1x141GB", {"train": {"activation_checkpointing": True}}, ["ok"]),
        ("1x24GB", {}, ["FAIL"]),
        ("1x24GB", {"student": "0.5b", "teacher": "1.5b",
                    "train": {"activation_checkpointing": True}}, ["ok"]),
        # 7B in full takes 122 GB of state: no card of 80, four of them.
        ("1x80GB", {"student": "7b", "teacher": "7b"}, ["FAIL"]),
        ("8x80GB", {"student": "7b", "teacher": "7b", "train": {
            "ranks": 4, "activation_checkpointing": True}}, ["ok"] * 6),
        # What grows, and is halved where there is no room, is a warning.
        ("1x40GB", {"student": "0.5b", "teacher": "1.5b", "generate": {"batch_size": 4096},
                    "train": {"activation_checkpointing": True}}, ["warn"]),
        # A launched server takes what others leave, unless it is told otherwise.
        ("1x80GB", {"train": {"activation_checkpointing": True},
                    "generate": {"engine": "vllm", "launch": {"venv": "v"}}}, ["ok"]),
        ("1x80GB", {"runtime": TOGETHER, "train": {"activation_checkpointing": True},
                    "generate": {"engine": "vllm", "launch": {"venv": "v", "memory": 0.9}}},
         ["FAIL"]),
        ("1x24GB", {"student": "0.5b", "teacher": "1.5b",
                    "generate": {"engine": "vllm", "launch": {"venv": "v"}}}, ["ok"]),
        ("1x24GB", {"student": "1.5b", "teacher": "1.5b",
                    "generate": {"engine": "vllm", "launch": {"venv": "v"}}}, ["FAIL"]),
        ("1x80GB", {"train": {"activation_checkpointing": True}, "generate": {
            "engine": "vllm",
            "launch": {"venv": "v", "args": ["--gpu-memory-utilization", "0.2"]}}}, ["ok"]),
        # In phases one role at a time has its models there, a server too.
        ("1x80GB", {"runtime": PHASES, "train": {"activation_checkpointing": True},
                    "generate": {"engine": "vllm", "launch": {"venv": "v"}}}, ["ok"]),
        ("1x24GB", {"runtime": PHASES, "student": "0.5b", "teacher": "7b",
                    "train": {"activation_checkpointing": True}}, ["ok"]),
        ("3x80GB", {"train": {"activation_checkpointing": True},
                    "generate": {"engine": "vllm", "launch": {"venv": "v"}}}, ["ok"] * 3),
    ],
)  # fmt: skip
def test_the_forecast_of_each_gpu(models, machine, settings, statuses):
    found = forecast(models, machine, **settings)
    assert [check.status for check in found] == statuses, [check.says for check in found]


def test_in_phases_the_largest_role_counts(models):
    together, phases = (
        forecast(models, "1x80GB", runtime={"kind": "local", "device": "cuda", "share": share},
                 train={"activation_checkpointing": True})[0].says
        for share in ("together", "phases")
    )  # fmt: skip
    assert "; 64.4 GiB of 79.2 GiB" in together, together
    assert re.search(r"; 3\d\.\d GiB at a time of 79\.2 GiB$", phases), phases


def test_a_forecast_lists_what_is_where(models):
    eager = {"activation_checkpointing": False}
    trainer, scorer, generator = forecast(models, "4x80GB", train=eager)
    assert trainer.says.startswith("GPU 0: trainer 23.0 (weights, gradients, AdamW) + "), (
        trainer.says
    )
    assert "(row of 32,768 tokens)" in trainer.says
    assert (
        "scorer-0 14.2 (teacher) + 2.9 (snapshot) + 2.2 (prefill of 16,384 tokens)" in scorer.says
    )
    assert " + 2.3 (logits)" in scorer.says
    assert "generator-0 2.9 (weights) + 1.3 (KV cache of 32 x 1,536 tokens)" in generator.says
    assert trainer.says.endswith("or lower train.row_tokens or loss.chunk")
    (alone,) = forecast(models, "24GB", student="7b", train={"activation_checkpointing": True},
                        runtime=TOGETHER)  # fmt: skip
    assert "give its processes GPUs of their own" in alone.says
    launch = {"engine": "vllm", "launch": {"venv": "v"}}
    shared = forecast(models, "2x80GB", score={"gpus": [1]}, generate=launch)[1]
    assert "generate's server 53.9 (68% of it)" in shared.says
    launch["launch"]["memory"] = 0.9
    shared = forecast(models, "2x80GB", score={"gpus": [1]}, generate=launch)[1]
    assert "generate's server 71.3 (90% of it)" in shared.says
    assert "bound the server's share (launch.memory)" in shared.says


@pytest.mark.parametrize("text", ["8x80GB", "8 x 80 GB", "8×80GiB", "8*80G", "8x80"])
def test_machines_as_people_write_them(text):
    gpus = parse_gpus(text)
    assert len(gpus) == 8
    assert gpus[0].total == math.floor(0.99 * 80 * GIB)


@pytest.mark.parametrize("text", ["", "many", "0x80GB", "8x", "-1x80GB", "8x0GB", "A100", "8x80TB"])
def test_what_is_no_machine(text):
    with pytest.raises(InputError, match="is no machine: write it like 8x80GB"):
        parse_gpus(text)


def test_the_drivers_numbers_are_those_of_the_gpus_that_are_seen(tmp_path, monkeypatch):
    """No context is left on a GPU by asking; names and ids of CUDA_VISIBLE_DEVICES are known."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nprintf '0, GPU-aaaa, 81559, 80000\\n1, GPU-bbbb, 24564, 1000\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb,0")
    monkeypatch.setattr("npd.control.devices.placement.num_gpus", lambda *_: 2)
    first, second = gpus_here(make(device="cuda"))
    assert (first.total, first.free) == (24564 * 2**20, 1000 * 2**20)
    assert (second.name, second.total, second.free) == ("0", 81559 * 2**20, 80000 * 2**20)
    assert gpus_here(make(device="cpu")) == ()


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ("0, GPU-aaaa, [N/A], [N/A]", "0"),  # memory shared with the CPU
        ("0, GPU-aaaa, 81559, 80000", "MIG-1234"),
        ("0, GPU-aaaa, 81559, [Insufficient Permissions]", "GPU-aa"),
        ("", "0"),
    ],
)
def test_memory_that_the_driver_does_not_tell_is_not_known(
    tmp_path, monkeypatch, models, rows, names
):
    """A run starts all the same, with the usual defaults, and without a context on the GPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{rows}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    monkeypatch.setattr("npd.control.devices.placement.num_gpus", lambda *_: 1)
    config = make(device="cuda", student=str(models / "7b"))
    assert gpus_here(config) is None
    assert with_defaults(config).train.activation_checkpointing is False


def test_the_beginning_of_an_id_is_enough(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0, GPU-aaaa, 81559, 80000\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
    monkeypatch.setattr("npd.control.devices.placement.num_gpus", lambda *_: 1)
    (gpu,) = gpus_here(make(device="cuda"))
    assert gpu.total == 81559 * 2**20


# What is `auto`.


@pytest.mark.parametrize(
    ("machine", "settings", "is_on"),
    [
        ("1x80GB", {}, True),  # 1.5B and 7B
        ("8x141GB", {}, False),  # a full row, and nothing beside it
        ("8x80GB", {}, True),
        ("1x80GB", {"student": "0.5b", "teacher": "1.5b"}, False),
        ("1x24GB", {"student": "0.5b", "teacher": "1.5b"}, True),
        ("8x80GB", {"train": {"row_tokens": 4096}}, False),
        ("1x80GB", {"kind": "ray", "runtime": {"ray": {"address": "auto"}}}, False),
        ("1x80GB", {"student": "nowhere"}, False),
        ("1x80GB", {"train": {"activation_checkpointing": False}}, False),
    ],
)
def test_activations_are_recomputed_where_a_row_would_not_fit(models, machine, settings, is_on):
    settings = {"student": "1.5b", "teacher": "7b", **settings}
    paths = {role: str(models / settings.pop(role)) for role in ("student", "teacher")}
    config = with_defaults(make(**paths, **settings), parse_gpus(machine))
    assert config.train.activation_checkpointing is is_on
    notes = chosen(make(**paths, **settings), config)
    assert any("activations are recomputed" in note for note in notes) is is_on
    # The preset's default fits the cards that the documentation names.
    if is_on:
        assert all(check.status == "ok" for check in memory_checks(config, parse_gpus(machine)))


CPU, SMALL, LARGE = (4096, 512), (8192, 1024), (16_384, 2048)
ON_GPU_1 = {"score": {"gpus": [1]}}
NEVER = {"schedule": {"epochs": 10, "refresh": "never"}}


@pytest.mark.parametrize(
    ("machine", "settings", "sizes"),
    [
        ("1x141GB", {}, LARGE),
        ("8x80GB", {}, LARGE),
        # What the trainer lacks elsewhere is no reason to score in small rows.
        ("3x24GB", {"student": "7b", "teacher": "0.5b"}, LARGE),
        # Beside a trainer the scorer gives way before activations are recomputed.
        ("1x80GB", {"train": {"activation_checkpointing": False}}, CPU),
        ("1x40GB", {"student": "0.5b", "teacher": "1.5b"}, LARGE),
        ("3x24GB", {"student": "0.5b", **ON_GPU_1}, LARGE),
        ("3x20GB", {"student": "0.5b", **ON_GPU_1}, SMALL),
        ("3x18GB", {"student": "0.5b", **ON_GPU_1}, CPU),
        ("3x8GB", {"student": "0.5b", **ON_GPU_1}, CPU),
        ("1x141GB", {"score": {"head_chunk": 7}}, (16_384, 7)),
        ("1x141GB", {"score": {"row_tokens": 5000}}, (5000, 2048)),
        ("1x141GB", {"score": {"engine": "vllm", "urls": ["http://a:1"]}}, CPU),
        ("1x141GB", {"student": "nowhere"}, LARGE),
        # Rows bound completions, which must not depend on the machine.
        ("1x141GB", {"generate": {"source": "dataset"}, **NEVER}, (4096, 2048)),
        ("1x141GB", {"generate": {"source": "dataset"}, **NEVER,
                     "data": {"max_completion_tokens": 99}}, LARGE),
    ],
)  # fmt: skip
def test_the_scorers_rows_are_what_fits(models, machine, settings, sizes):
    settings = {"student": "1.5b", "teacher": "7b", **settings}
    paths = {role: str(models / settings.pop(role)) for role in ("student", "teacher")}
    config = with_defaults(make(**paths, **settings), parse_gpus(machine))
    assert config.score.sizes == sizes
    # What is recorded loads again.
    assert RunConfig.model_validate(config.model_dump()).score == config.score


def test_on_a_cpu_the_sizes_are_those_they_were(models):
    asked = make(student=str(models / "1.5b"), device="cpu")
    config = with_defaults(asked)
    assert config.score.sizes == CPU
    assert config.loss.chunk is None
    assert chosen(asked, config) == ()
    assert with_defaults(config) is not asked
    everything = config.model_copy(update={"loss": config.loss.model_copy(update={"chunk": 9})})
    assert with_defaults(everything) is everything


def test_on_ray_each_scorer_decides_by_its_device():
    config = with_defaults(make(kind="ray", runtime={"ray": {"address": "auto"}}))
    assert (config.score.row_tokens, config.score.head_chunk) == ("auto", "auto")


def test_the_losss_chunk_is_what_fits(models):
    """A fourth, before activations are recomputed; a chunk that was asked for stays."""
    paths = {"student": str(models / "0.5b"), "teacher": str(models / "0.5b")}
    alone = {**paths, **ON_GPU_1}
    for size, rows, expected in ((80, 8192, (None, False)), (24, 8400, (1024, False)),
                                 (24, 16_384, (None, True))):  # fmt: skip
        asked = make(**alone, train={"row_tokens": rows})
        config = with_defaults(asked, parse_gpus(f"2x{size}GB"))
        assert (config.loss.chunk, config.train.activation_checkpointing) == expected, size
        notes = chosen(asked, config)
        assert len(notes) == (expected != (None, False))
        if expected[0]:
            assert "the loss takes 1,024 tokens at once" in notes[0]
    fixed = make(**alone, train={"row_tokens": 8400}, loss={"chunk": 4096})
    assert with_defaults(fixed, parse_gpus("2x24GB")).loss.chunk == 4096


def test_a_lone_scorer_has_the_gpu_to_itself(models):
    """As in `npd score`."""
    config = make(student=str(models / "1.5b"), teacher=str(models / "7b"), scorers=4)
    gpus = parse_gpus("1x22GB")
    assert with_defaults(config, gpus).score.sizes == CPU
    assert with_defaults(config, gpus, alone="scorer").score.sizes == SMALL


def test_a_lone_trainer_has_the_gpu_to_itself(models):
    """As in `npd train`: one process, whatever the config says of ranks and of others."""
    paths = {role: str(models / name) for role, name in (("student", "1.5b"), ("teacher", "7b"))}
    rows = {"train": {"row_tokens": 8192}, "runtime": TOGETHER}
    config = make(**paths, **rows, score={"dtype": "float32"})
    gpus = parse_gpus("1x80GB")
    assert with_defaults(config, gpus).train.activation_checkpointing is True
    assert with_defaults(config, gpus, alone="trainer").train.activation_checkpointing is False
    spread = make(**paths, ranks=4, score={"gpus": [0]})
    assert with_defaults(spread, gpus, alone="trainer").train.activation_checkpointing is True


def test_a_servers_share_is_all_it_takes(models):
    """Its context is in it; both spellings of the flag are understood."""
    for flag in ("--gpu-memory-utilization=0.97", "--gpu_memory_utilization 0.97"):
        launch = {"venv": "v", "gpus": ["1"], "args": flag.split()}
        found = forecast(models, "2x24GB", "0.5b", "0.5b",
                         train={"activation_checkpointing": True},
                         generate={"engine": "vllm", "launch": launch})  # fmt: skip
        assert [check.status for check in found] == ["ok", "ok"], [c.says for c in found]
        assert "generate's server 23.0 (97% of it)" in found[1].says


VLLM = {"engine": "vllm", "launch": {"venv": "v"}}


def shares(models, machine, student="1.5b", teacher="7b", **settings):
    """The share of each section's servers, as a run on that machine decides."""
    runtime = {"share": "together", **settings.pop("runtime", {})}
    paths = {"student": str(models / student), "teacher": str(models / teacher)}
    config = make(**paths, **settings, runtime=runtime)
    decided = with_defaults(config, parse_gpus(machine))
    return {where: launch.memory for where, launch in decided.launches.items()}


@pytest.mark.parametrize(
    ("machine", "settings", "expected"),
    [
        ("1x80GB", {"generate": VLLM}, {"generate": 0.2}),
        # In phases the others are away, but for their contexts.
        ("1x80GB", {"generate": VLLM, "runtime": {"share": "phases"}}, {"generate": 0.9}),
        ("1x24GB", {"generate": VLLM, "runtime": {"share": "phases"}}, {"generate": 0.9}),
        ("1x141GB", {"generate": VLLM}, {"generate": 0.53}),
        # Alone on its GPU it is left to itself.
        ("3x80GB", {"generate": VLLM}, {"generate": "auto"}),
        ("2x80GB", {"generate": {"engine": "vllm", "launch": {"venv": "v", "gpus": ["1"]}}},
         {"generate": "auto"}),
        # Beside the scorer; two of them share what it leaves; the fullest GPU counts for both.
        ("2x80GB", {"generate": VLLM}, {"generate": 0.68}),
        ("2x80GB", {"generate": VLLM, "generators": 2}, {"generate": 0.34}),
        ("3x80GB", {"generate": VLLM, "generators": 2}, {"generate": 0.68}),
        # Two models on servers beside each other, and beside the snapshot of the scorer.
        ("2x80GB", {"generate": VLLM, "score": VLLM}, {"generate": 0.37, "score": 0.52}),
        # What the config says is kept.
        ("1x80GB", {"generate": {"engine": "vllm", "launch": {"venv": "v", "memory": 0.3}}},
         {"generate": 0.3}),
        ("1x80GB", {"generate": {"engine": "vllm", "launch": {
            "venv": "v", "args": ["--gpu_memory_utilization", "0.3"]}}}, {"generate": "auto"}),
        ("1x80GB", {"generate": {"engine": "vllm", "launch": {
            "venv": "v", "args": ["--config", "mine.yaml"]}}}, {"generate": "auto"}),
        # Not known, or not ours to say.
        ("1x80GB", {"generate": VLLM, "student": "nowhere"}, {"generate": "auto"}),
        ("1x80GB", {"generate": VLLM, "kind": "ray", "runtime": {"ray": {"address": "auto"}}},
         {"generate": "auto"}),
        ("1x24GB", {"generate": VLLM}, {"generate": "auto"}),  # nothing is left: refused
    ],
)  # fmt: skip
def test_a_server_beside_others_takes_what_they_leave(models, machine, settings, expected):
    assert shares(models, machine, **settings) == expected


@given(
    machine=st.sampled_from(["1x24GB", "1x48GB", "1x80GB", "2x80GB", "4x141GB"]),
    student=st.sampled_from(["0.5b", "1.5b", "7b"]),
    teacher=st.sampled_from(["0.5b", "1.5b", "7b"]),
    generators=st.integers(1, 3),
    serves_teacher=st.booleans(),
)
def test_servers_with_a_share_have_room_for_their_weights_and_all_fit(
    models, machine, student, teacher, generators, serves_teacher
):
    settings = {"score": VLLM} if serves_teacher else {}
    names = {"student": str(models / student), "teacher": str(models / teacher)}
    config = make(generators=generators, **names, **settings, generate=VLLM, runtime=TOGETHER)
    gpus = parse_gpus(machine)
    decided = with_defaults(config, gpus)
    checks = list(memory_checks(config, gpus))
    for where, launch in decided.launches.items():
        if launch.memory != "auto":
            size = size_of(names["student" if where == "generate" else "teacher"])
            assert launch.memory * gpus[0].total > 2 * size.parameters
            assert launch.memory <= 0.9
            assert all(check.status != "FAIL" for check in checks if f"{where}'s" in check.says)


def with_gpu(tmp_path, monkeypatch, total, free):
    """A machine with one GPU of so many MiB."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '0, GPU-aaaa, {total}, {free}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("npd.control.devices.placement.num_gpus", lambda *_: 1)


def test_what_others_have_is_not_given_to_a_server(tmp_path, monkeypatch, models):
    """A run starts with the share of what is free, says so, and a resumed one asks again."""
    paths = {"student": str(models / "0.5b"), "teacher": str(models / "1.5b")}
    thrifty = {"activation_checkpointing": True}
    together = {"device": "cuda", "share": "together"}
    config = make(runtime=together, **paths, generate=VLLM, train=thrifty)
    found = []
    for free in (80_000, 50_000):
        with_gpu(tmp_path, monkeypatch, 81_559, free)
        decided = with_defaults(config)
        check_servers(decided)
        found.append(decided.generate.launch.memory)
        (said,) = [line for line in chosen(config, decided) if "server" in line]
        assert said.startswith(f"generate's server takes {found[-1]:.0%} of its GPU's memory")
    assert found[0] - found[1] == pytest.approx(30_000 / 81_559, abs=0.011)


def test_a_server_for_which_nothing_is_left_is_refused(tmp_path, monkeypatch, models):
    with_gpu(tmp_path, monkeypatch, 24_564, 24_000)
    paths = {"student": str(models / "1.5b"), "teacher": str(models / "1.5b")}
    together = {"device": "cuda", "share": "together"}
    config = with_defaults(make(runtime=together, **paths, generate=VLLM))
    with pytest.raises(
        ConfigError, match=r"GPU 0 \(24.0 GiB\) has no room for generate's"
    ) as caught:
        check_servers(config)
    assert "trainer, scorer-0" in str(caught.value)
    assert len(str(caught.value)) <= 300
    told = {**VLLM, "launch": {"venv": "v", "memory": 0.1}}
    check_servers(with_defaults(make(runtime=together, **paths, generate=told)))


def test_a_server_beside_models_of_unknown_size_is_a_warning(models):
    config = make(student="hub/name", teacher=str(models / "7b"), generate=VLLM)
    first, second = memory_checks(config, parse_gpus("2x80GB"))
    assert "its size is not known" in first.says
    assert second.status == "warn"
    assert second.says.startswith("GPU 1: generate's server takes 90% of it beside scorer-0: set")
    (alone,) = memory_checks(config, parse_gpus("3x80GB"))
    assert alone == first
    told = {**VLLM, "launch": {"venv": "v", "memory": 0.2}}
    assert list(memory_checks(make(student="hub/name", generate=told), parse_gpus("1x80GB"))) == [
        first
    ]


def test_the_forecast_follows_the_names_of_gpus(models):
    """`launch.gpus` are the driver's, also where CUDA_VISIBLE_DEVICES shows others first."""
    config = make(
        student=str(models / "0.5b"), teacher=str(models / "0.5b"),
        train={"activation_checkpointing": True},
        generate={"engine": "vllm", "launch": {"venv": "v", "gpus": ["5"]}},
    )  # fmt: skip
    found = list(memory_checks(config, [Gpu("5", 80 * GIB), Gpu("4", 80 * GIB)]))
    assert [check.says[:5] for check in found] == ["GPU 5", "GPU 4"]
    assert "generate's server" in found[0].says
    assert "trainer" not in found[0].says
    assert "trainer" in found[1].says
