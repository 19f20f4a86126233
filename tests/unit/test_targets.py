"""Target cards: every shipped number has a source, and a wrong card is refused with file and key."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import pytest

from edgekd import card as card_module
from edgekd import target as target_module
from edgekd.errors import RecipeError, UsageError
from edgekd.target import (
    Quantity,
    Target,
    all_targets,
    find_target,
    is_this_machine,
    load_card,
    quantities,
)

CARDS = Path(__file__).parents[2] / "targets"
DOCS = Path(__file__).parents[2] / "docs" / "targets.md"
IDS = sorted(path.stem for path in CARDS.glob("*.toml"))
ALIASES = (  # each has been published: none may vanish
    "jetson", "orin-nano", "orin-nx", "agx-orin", "thor", "xavier-nx", "rpi4", "rpi5", "android", "x86",
    "spr", "vnni", "avx2", "n100", "core-ultra", "igpu", "npu", "web",
)  # fmt: skip


@pytest.fixture(scope="module")
def cards() -> dict[str, Target]:
    return all_targets()


def test_all_cards_load_and_none_has_vanished(cards: dict[str, Target]) -> None:
    assert list(cards) == IDS
    assert set(IDS) >= {
        "jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin", "jetson-thor",
        "jetson-xavier-nx-8gb", "rpi4-4gb", "rpi5-8gb", "android-arm64", "x86-amx-server", "x86-vnni",
        "x86-avx2", "intel-n100", "intel-core-ultra-cpu", "intel-core-ultra-igpu", "intel-npu", "web-wasm",
    }  # fmt: skip


@pytest.mark.parametrize("card_id", IDS)
def test_every_number_names_its_source_and_confidence(card_id: str, cards: dict[str, Target]) -> None:
    found = quantities(cards[card_id])
    assert found
    for key, quantity in found:
        assert quantity.source.strip(), key
        assert quantity.confidence in ("primary", "measured", "policy", "unverified"), key


@pytest.mark.parametrize("card_id", IDS)
def test_every_card_gives_a_roofline(card_id: str, cards: dict[str, Target]) -> None:
    for unit in cards[card_id].compute[:1]:
        assert {"int8_tops", "fp32_gflops"} & unit.peak.keys()
        assert {"dram_gbs", "copy_gbs"} & unit.bandwidth.keys()


@pytest.mark.parametrize("card_id", IDS)
def test_activations_follow_the_runtime(card_id: str, cards: dict[str, Target]) -> None:
    activations = cards[card_id].quant.activations
    runtimes = {unit.runtime for unit in cards[card_id].compute}
    if "tensorrt" in runtimes:
        assert (activations.dtype, activations.zero_point) == ("int8", 0)
    if "openvino" in runtimes:  # int8 asymmetric does not compile there
        assert activations.dtype == "uint8" or activations.symmetric
    if cards[card_id].device_class == "arm-cpu":
        assert activations.relu_zero_point == -128


def test_only_the_card_without_vnni_reduces_the_weight_range(cards: dict[str, Target]) -> None:
    assert [name for name, card in cards.items() if card.quant.weights.reduce_range] == ["x86-avx2"]


def test_quantities_walks_lists_and_tables(cards: dict[str, Target]) -> None:
    keys = [key for key, _ in quantities(cards["jetson-orin-nano-8gb"])]
    assert "compute[0].peak.int8_tops" in keys
    assert "measure.reject_if.temp_c" in keys
    assert "detect.cuda_capability" in keys
    assert len(keys) == len(set(keys))


def test_compute_capability_is_text(cards: dict[str, Target]) -> None:
    assert cards["jetson-orin-nano-8gb"].compute_capability == "8.7"
    assert cards["rpi5-8gb"].compute_capability == ""


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_finds_its_card(alias: str) -> None:
    assert alias in find_target(alias).aliases


def test_id_finds_its_card() -> None:
    for card_id in IDS:
        assert find_target(card_id).id == card_id


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find_target("jetsn")
    assert "unknown target 'jetsn'" in caught.value.message
    assert caught.value.hint == "did you mean 'jetson'?"
    with pytest.raises(UsageError) as caught:
        find_target("zzzzzz")
    assert "rpi5-8gb" in caught.value.message


def _own_card(
    folder: Path, *edits: tuple[str, str], source: str = "rpi5-8gb", stem: str = "my-board"
) -> Path:
    text = (CARDS / f"{source}.toml").read_text()
    for old, new in (*edits, (f'id = "{source}"', f'id = "{stem}"')):
        assert old in text, old
        text = text.replace(old, new, 1)
    path = folder / f"{stem}.toml"
    path.write_text(text)
    return path


def test_a_users_card_is_found_by_path(tmp_path: Path) -> None:
    assert find_target(str(_own_card(tmp_path))).id == "my-board"


def test_a_missing_card_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml: No such file"):
        find_target(str(tmp_path / "absent.toml"))


NANO = "jetson-orin-nano-8gb"
CORES = 'cores = { value = 4, source = "circuitdigest.com", confidence = "unverified" }'
# name: (card, old text, new text, key the error names, what else it says)
BAD_CARDS = {
    "unknown top key": ("rpi5-8gb", "schema = 1", "schema = 1\ncolour = 3", "colour", "unknown key"),
    "unknown nested key": ("rpi5-8gb", "[memory]", "[memory]\nspeed = 3", "memory.speed", "unknown key"),
    "unknown quantity key": ("rpi5-8gb", CORES, CORES.replace("source", "sauce"), "sauce", "unknown key"),
    "unknown key says which are known": (
        "rpi5-8gb",
        "[memory]",
        "[memory]\nspeed = 3",
        "memory.speed",
        "expected one of: capacity_mb, model_budget_mb, unified",
    ),
    "unknown key of a quantity": (
        "rpi5-8gb",
        CORES,
        CORES.replace("source", "sauce"),
        "compute[0].facts.cores.sauce",
        "expected one of: confidence, derivation, mode, shape, source, sparse, value",
    ),
    "unknown key of a runtime": (
        "web-wasm",
        "[runtime.onnxruntime-web]",
        "[runtime.onnxruntime-web]\ndevices = 1",
        "runtime.onnxruntime-web.devices",
        "expected one of: build_on_device, device, ep,",
    ),
    "missing key": ("rpi5-8gb", 'class = "arm-cpu"\n', "", "class", "missing"),
    "missing source": (
        "rpi5-8gb",
        ' source = "circuitdigest.com",',
        "",
        "compute[0].facts.cores.source",
        "missing",
    ),
    "bad runtime table": (
        "rpi5-8gb",
        "[check",
        "[runtime.openvino]\ndevices = 1\n[check",
        "openvino.devices",
        "unknown",
    ),
    "bad rejection": (
        "rpi5-8gb",
        "throttled = true",
        "throttled = 3",
        "measure.reject_if.throttled",
        "`int`",
    ),
    "bad option": ("rpi5-8gb", 'ep = [["CPU', 'ep = [[3, "CPU', "runtime.onnxruntime.ep", "`array`"),
    "empty source": (
        "rpi5-8gb",
        CORES,
        CORES.replace("circuitdigest.com", " "),
        "facts.cores.source",
        "empty",
    ),
    "bare number": ("rpi5-8gb", CORES, "cores = 4", "compute[0].facts.cores", "got `int`"),
    "bad confidence": ("rpi5-8gb", CORES, CORES.replace("unverified", "sure"), "compute", "'sure'"),
    "wrong type": ("rpi5-8gb", "unified = true", 'unified = "yes"', "memory.unified", "got `str`"),
    "wrong schema": ("rpi5-8gb", "schema = 1", "schema = 2", "schema", "2"),
    "unknown class": ("rpi5-8gb", 'class = "arm-cpu"', 'class = "arm"', "class", "'arm'"),
    "unknown dialect": ("rpi5-8gb", '"arm-s8"', '"arm-s9"', "quant.dialect", "'arm-s9'"),
    "unknown op": ("rpi5-8gb", '"hardswish", ', '"hardswich", ', "space.forbidden_ops", "'hardswich'"),
    "no reason for a ban": (
        "rpi5-8gb",
        '\nsource = "ONNX Runtime leaves them in float around int8 convolutions; seen on x86, '
        'assumed for arm64"',
        "",
        "space.source",
        "empty",
    ),
    "sparse number under a dense key": (NANO, "sparse = false", "sparse = true", "peak.int8_tops", "_sparse"),
    "dense number under a sparse key": (
        NANO,
        "sparse = true",
        "sparse = false",
        "int8_tops_sparse",
        "sparse",
    ),
    "no power mode": (
        NANO,
        'value = 102.0, mode = "MAXN_SUPER (25 W)"',
        "value = 102.0",
        "dram_gbs.mode",
        "none",
    ),
    "speed without a unit": ("rpi5-8gb", "fp32_gflops =", "fp32 =", "compute[0].peak.fp32", "unit"),
    "speed of zero": ("rpi5-8gb", "value = 153.6", "value = 0", "peak.fp32_gflops.value", "> 0"),
    "speed as text": ("rpi5-8gb", "value = 153.6", 'value = "fast"', "peak.fp32_gflops.value", "'fast'"),
    "not a number": ("rpi5-8gb", "value = 4,", "value = nan,", "facts.cores.value", "finite"),
    "fractional channel multiple": (
        "rpi5-8gb",
        "channel_multiple = { value = 8",
        "channel_multiple = { value = 2.5",
        "space.channel_multiple.value",
        "2.5",
    ),
    "even kernel": ("rpi5-8gb", "kernels = [3, 5]", "kernels = [3, 4]", "space.kernels", "odd"),
    "no compute": ("web-wasm", '[[compute]]\nunit = "wasm"', '[[old]]\nunit = "wasm"', "", "unknown key"),
    "no table for the runtime": (
        "rpi5-8gb",
        "[runtime.onnxruntime]",
        "[runtime.openvino]",
        "runtime.onnxruntime",
        "none",
    ),
    "unknown runtime table": ("rpi5-8gb", "[check", "[runtime.onnx]\n[check", "runtime.onnx", "onnxruntime"),
    "precision both ways": (NANO, '["fp8", "fp4"]', '["int8"]', "compute[0].unsupported", "int8"),
    "asymmetric TensorRT": (
        NANO,
        'symmetric = true, granularity = "per-tensor"',
        'symmetric = false, granularity = "per-tensor"',
        "quant.activations.symmetric",
        "needs true",
    ),
    "wrong ReLU zero point": (
        "rpi5-8gb",
        "relu_zero_point = -128",
        "relu_zero_point = 0",
        "activations.relu_zero_point",
        "needs -128",
    ),
    "unsigned weights": (
        "rpi5-8gb",
        'weights = { dtype = "int8"',
        'weights = { dtype = "uint8"',
        "quant.weights",
        "int8",
    ),
    "capital id": ("rpi5-8gb", "schema = 1", "schema = 1", "id", "lower-case"),
    "malformed TOML": ("rpi5-8gb", "[memory]", "[memory", "", "not TOML"),
}


@pytest.mark.parametrize("case", BAD_CARDS)
def test_a_bad_card_is_refused_with_file_and_key(case: str, tmp_path: Path) -> None:
    source, old, new, key, expected = BAD_CARDS[case]
    stem = "Board" if case == "capital id" else "my-board"
    path = _own_card(tmp_path, (old, new), source=source, stem=stem)
    with pytest.raises(RecipeError) as caught:
        load_card(path)
    assert caught.value.message.startswith(f"target card {path}: ")
    assert key in caught.value.message
    assert expected in caught.value.message
    assert "docs/targets.md" in caught.value.hint
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    ("source", "runtime", "dialect", "taken"),
    [
        ("rpi5-8gb", "openvino", "arm-s8", "onnxruntime"),
        (NANO, "onnxruntime", "trt-s8sym", "tensorrt"),
        ("x86-amx-server", "tensorrt", "x86-u8-relu0", "onnxruntime and openvino"),
    ],
)
def test_a_dialect_of_another_runtime_is_refused(
    tmp_path: Path, source: str, runtime: str, dialect: str, taken: str
) -> None:
    old = find_target(source).primary.runtime
    edits = ((f'runtime = "{old}"', f'runtime = "{runtime}"'), (f"[runtime.{old}]", f"[runtime.{runtime}]"))
    path = _own_card(tmp_path, *edits, source=source)
    with pytest.raises(RecipeError) as caught:
        load_card(path)
    expected = f"expected one that '{runtime}' (compute[0]) takes, got '{dialect}', which is for {taken}"
    assert caught.value.message == f"target card {path}: key 'quant.dialect': {expected}"


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        ("Intel(R) N100", "avx2 fma avx_vnni", ["intel-n100"]),
        ("Intel(R) Core(TM) Ultra 7 155H", "fpu avx2 fma avx_vnni", ["intel-core-ultra-cpu"]),
        ("Intel(R) Core(TM) i5-13500", "avx2 fma avx_vnni", ["x86-avx2"]),
        ("Intel(R) Xeon(R) Gold 6348", "avx2 fma avx512f avx512_vnni", ["x86-vnni"]),
        ("Intel(R) Xeon(R)", "avx2 fma avx_vnni avx512_vnni amx_int8", ["x86-amx-server"]),
        ("AMD FX-8350", "avx fma", []),
    ],
)
def test_this_machine_is_the_card_that_says_most_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: str, expected: list[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\n")
    monkeypatch.setattr(target_module, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(target_module, "_DEVICE_TREE", tmp_path / "absent")
    assert [name for name, card in all_targets().items() if is_this_machine(card)] == expected


def test_eight_bit_weights_ask_for_the_vnni_that_the_card_names(cards: dict[str, Target]) -> None:
    from edgekd.stages.variants import planned_variants

    wanted = {"intel-n100": ("avx_vnni",), "x86-vnni": ("avx512_vnni",), "x86-avx2": ()}
    for name, flags in wanted.items():
        plans = planned_variants(cards[name], True, False)
        assert next(plan for plan in plans if plan.id == "onnxruntime-int8").requires_cpu_flags == flags


def test_on_arm64_a_symmetric_grid_takes_the_graph_whose_convolutions_fuse(cards: dict[str, Target]) -> None:
    """`edgekd check --emulate`: of int8.onnx of a symmetric grid ONNX Runtime fuses next to nothing."""
    from edgekd.stages.variants import planned_variants

    for name, file in (("jetson-orin-nano-8gb", "uint8.onnx"), ("rpi5-8gb", "int8.onnx")):
        plans = {plan.id: plan for plan in planned_variants(cards[name], True, False)}
        assert plans["onnxruntime-arm64-int8"].file == file
        assert plans["openvino-int8"].file == "openvino.onnx"


def test_a_board_is_known_by_its_device_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_text("Raspberry Pi 4 Model B Rev 1.4\0")
    monkeypatch.setattr(target_module, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(target_module, "_DEVICE_TREE", tmp_path / "model")
    assert [name for name, card in all_targets().items() if is_this_machine(card)] == ["rpi4-4gb"]


def test_a_card_without_compute_is_refused(tmp_path: Path) -> None:
    text = (CARDS / "web-wasm.toml").read_text()
    begin, end = text.index("[[compute]]"), text.index("[space]")
    path = tmp_path / "web-wasm.toml"
    path.write_text(text[:begin].replace("schema = 1", "schema = 1\ncompute = []") + text[end:])
    with pytest.raises(RecipeError, match=r"key 'compute': expected at least one"):
        load_card(path)


def test_the_id_must_equal_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    shutil.copy(CARDS / "rpi5-8gb.toml", path)
    with pytest.raises(RecipeError, match=r"other\.toml: key 'id': expected the file's stem 'other'"):
        load_card(path)


def test_an_alias_belongs_to_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(CARDS / "rpi5-8gb.toml", tmp_path)
    _own_card(tmp_path, stem="zz-board")  # has the alias 'rpi5' as well
    monkeypatch.setattr(target_module, "data_folder", lambda name: tmp_path)
    with pytest.raises(RecipeError, match=r"zz-board\.toml: key 'aliases': 'rpi5' already names 'rpi5-8gb'"):
        all_targets()


def test_an_alias_may_not_be_another_cards_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_card(tmp_path, ('aliases = ["rpi5"]', 'aliases = ["zz-board"]'), stem="a-board")
    _own_card(tmp_path, stem="zz-board")
    monkeypatch.setattr(target_module, "data_folder", lambda name: tmp_path)
    with pytest.raises(RecipeError, match=r"'zz-board' already names 'zz-board'"):
        all_targets()


def test_the_documentation_names_every_card_and_key(cards: dict[str, Target]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    for card in cards.values():
        for name in (card.id, *card.aliases, card.quant.dialect):
            assert f"`{name}`" in text
    structs = [value for value in vars(card_module).values() if isinstance(value, type)]
    for struct in structs:
        if issubclass(struct, msgspec.Struct):
            for field in msgspec.structs.fields(struct):
                assert re.search(rf"[`.]{field.encode_name}\b", text), (
                    f"{struct.__name__}.{field.encode_name}"
                )


def test_a_quantity_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Quantity(value=1.0, source="x", confidence="policy").value = 2.0  # type: ignore[misc]
