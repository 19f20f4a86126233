"""Projects around a bundle: a small program in one language that builds, runs and checks itself.

In the templates ``@NAME@`` is filled in. Every project carries the model, golden inputs with the logits of
its variant, and a golden picture with what `edgekd.runtime` makes of it, so that the program's own
preprocessing is checked as well.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgekd import __version__
from edgekd.bundle import verify_bundle
from edgekd.embed.fill import copy_templates, golden_files, model_header, model_json
from edgekd.errors import BundleError, StorageError, UsageError, unknown_name
from edgekd.manifest import Manifest, Variant, read_manifest
from edgekd.runtime import cpu_flags, machine

ONNXRUNTIME_WEB = "1.30.0"  # the release that the page was run with


@dataclass(frozen=True)
class Language:
    """A project's engines in order of preference, its templates, and how it is built and checked."""

    engines: tuple[str, ...]
    templates: tuple[str, ...]
    any_arch: bool  # the engine runs everywhere, whatever the host is
    commands: tuple[str, ...]  # shown after writing


LANGUAGES = {
    "cpp": Language(
        ("openvino",),
        ("native", "cpp"),
        False,
        (
            "cmake -S . -B build -DOpenVINO_DIR=...  # README.md has the path",
            "cmake --build build",
            "build/classify --check",
        ),
    ),
    "c": Language(
        ("onnxruntime",),
        ("native", "c"),
        False,
        (
            "cmake -S . -B build -DONNXRUNTIME_LIBRARY=...  # README.md has the path",
            "cmake --build build",
            "build/classify --check",
        ),
    ),
    "web": Language(
        ("onnxruntime-web", "onnxruntime"),
        ("web",),
        True,
        ("npm install --ignore-scripts", "npm run check", "npm start"),
    ),
    "python": Language(
        ("onnxruntime", "openvino"),
        ("python",),
        False,
        ("python -m pip install -r requirements.txt", "python service.py --check", "python service.py"),
    ),
    "docker": Language(
        ("onnxruntime", "openvino"),
        ("python", "docker"),
        False,
        ("docker build -t classifier .", "docker run --rm -p 8080:8080 classifier"),
    ),
}


@dataclass(frozen=True)
class Project:
    """What was written."""

    folder: Path
    variant: str
    engine: str
    commands: tuple[str, ...]


def write_project(bundle: Path, lang: str, out: Path, variant: str | None = None) -> Project:
    """Write the project ``lang`` for ``bundle`` into the new or empty folder ``out``.

    Raises:
        UsageError: an unknown language, or the folder holds files already.
        BundleError: the bundle is not sound, or none of its variants fits the language and this machine.
        StorageError: the folder cannot be written; nothing is left half-written.
    """
    if lang not in LANGUAGES:
        raise UsageError(*unknown_name("language", lang, LANGUAGES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder", "choose another folder: --out FOLDER")
    manifest = read_manifest(bundle)
    if problems := verify_bundle(bundle):
        raise BundleError(f"{bundle} is not sound: {'; '.join(problems)}", "copy the bundle again")
    chosen, engine = choose_variant(manifest, lang, variant)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            new = Path(temporary) / "project"
            _fill(bundle, manifest, chosen, lang, new, _values(manifest, chosen, engine, variant is not None))
            if out.exists():
                out.rmdir()
            new.rename(out)
    except OSError as error:
        reason = "it was filled meanwhile" if error.errno == errno.ENOTEMPTY else error.strerror or str(error)
        raise StorageError(
            f"cannot write {out}: {reason}", "choose a writable folder with free space: --out FOLDER"
        ) from error
    return Project(out, chosen.id, engine, LANGUAGES[lang].commands)


def choose_variant(manifest: Manifest, lang: str, forced: str | None) -> tuple[Variant, str]:
    """(variant, engine): the first that the language's engines run on this machine, or the forced one.

    Forcing skips the checks of architecture and CPU flags, for a project that is meant for another machine.
    In the browser float comes first: ONNX Runtime Web ran every int8 form slower (target card ``web-wasm``).

    Raises:
        BundleError: none fits; the message says why of each.
    """
    known = {variant.id: variant for variant in manifest.variants}
    if forced is not None and forced not in known:
        raise BundleError(*unknown_name("variant", forced, known))
    candidates = list(manifest.variants) if forced is None else [known[forced]]
    if lang == "web":
        candidates.sort(
            key=lambda variant: ("onnxruntime-web" not in variant.runtime, variant.quant != "none")
        )
    rejected = []
    for variant in candidates:
        engine, problem = _engine(variant, LANGUAGES[lang], lang, forced is not None)
        if not problem:
            return variant, engine
        rejected.append(f"{variant.id}: {problem}")
    raise BundleError(
        f"no variant of this bundle fits --lang {lang}: {'; '.join(rejected) or 'it holds none'}",
        "--variant ID takes a variant that is made for another machine; another --lang has another engine",
    )


def _engine(variant: Variant, language: Language, lang: str, forced: bool) -> tuple[str, str]:
    """(engine, why the variant does not fit); the reason is empty when it does."""
    engine = next((name for name in language.engines if name in variant.runtime), "")
    if not engine:
        return "", f"made for {', '.join(variant.runtime)}, not for {' or '.join(language.engines)}"
    if variant.build:
        return engine, "its engine is built on the device"
    providers = [name for name, _ in variant.ep if name != "CPUExecutionProvider"]
    if engine == "onnxruntime" and providers and lang in ("c", "web"):
        return engine, f"needs {', '.join(providers)}, this project has the CPU only"
    if forced:
        return engine, ""
    if variant.arch and not language.any_arch and machine() not in variant.arch:
        return engine, f"made for {', '.join(variant.arch)}, this is {machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    here = cpu_flags(cpuinfo.read_text(errors="replace")) if cpuinfo.exists() else set()
    missing = set(variant.requires_cpu_flags) - (set() if language.any_arch else here)
    return engine, f"the CPU does not report {', '.join(sorted(missing))}" if missing else ""


def _values(manifest: Manifest, variant: Variant, engine: str, forced: bool) -> dict[str, str]:
    """What stands in the templates between two '@'."""
    least = {"onnxruntime": "1.22", "openvino": "2025.0"} | variant.min_version
    plain = "".join(letter if letter.isalnum() or letter in " ._-" else "_" for letter in manifest.name)
    package = "onnxruntime" if engine == "onnxruntime-web" else engine
    return {
        "NAME": plain,
        "EDGEKD": __version__,
        "VARIANT": variant.id,
        "QUANT": "float" if variant.quant == "none" else f"quantized {variant.quant}",
        "PRECISION": variant.precision,
        "ENGINE": package,
        "REQUIREMENT": f"{package}>={least[package]}",
        "OPENVINO": f">={least['openvino']}",
        "ONNXRUNTIME": f">={least['onnxruntime']}",
        "ONNXRUNTIME_WEB": ONNXRUNTIME_WEB,
        "FORCED": repr(variant.id) if forced else "None",
    }


def _fill(
    bundle: Path, manifest: Manifest, variant: Variant, lang: str, new: Path, values: dict[str, str]
) -> None:
    """Write the whole project into the folder ``new``."""
    golden = golden_files(bundle, manifest, variant)
    for name in LANGUAGES[lang].templates:
        copy_templates(name, new, values)
    data = new / {"cpp": "data", "c": "data", "web": "public"}.get(lang, "")
    if lang in ("cpp", "c"):
        (new / "model.h").write_text(model_header(manifest, variant, lang, golden.count), encoding="utf-8")
    if lang == "web":
        (data / "model.json").write_text(model_json(manifest, variant, golden.count), encoding="utf-8")
    if lang in ("python", "docker"):
        from edgekd import runtime

        shutil.copytree(bundle, new / "model.ekd")
        shutil.copyfile(str(runtime.__file__), new / "edgekd_runtime.py")
    else:
        data.mkdir(exist_ok=True)
        shutil.copyfile(bundle / variant.file, data / "model.onnx")
    golden.write(data / "golden", tensors=lang not in ("python", "docker"))
