"""The Android project: what of it can be told without Android's SDK.

Its bridge is compiled for this machine and called from a Java program, with classes made from the Kotlin declarations.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from edge_building import ROOT, SOURCES, java_home, onnxruntime_library, run, unpacked
from edge_bundles import variant, write_bundle
from edge_models import genai_graph, greedy, reference, tiny
from tokenizers import Tokenizer, decoders, models

PROJECT = ROOT / "examples" / "android"
APP = PROJECT / "app" / "src" / "main"
KOTLIN = APP / "kotlin" / "dev" / "transom" / "edge"
TYPES = {
    "String": "String",
    "Array<String>": "String[]",
    "Int": "int",
    "Long": "long",
    "Double": "double",
    "Boolean": "boolean",
    "Sink": "Sink",
    "": "void",
}


def declared() -> dict[str, tuple[list[str], str]]:
    """What Native.kt declares: Java types of arguments and of the result, by name."""
    text = (KOTLIN / "Native.kt").read_text()
    found = re.findall(r"@JvmStatic\s+external fun (\w+)\(([^)]*)\)(?:: ([\w<>]+))?", text)
    assert len(found) == text.count("external fun")
    return {
        name: ([TYPES[kind] for kind in re.findall(r"\w+: ([\w<>]+)", arguments)], TYPES[result])
        for name, arguments, result in found
    }


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Java classes with the native methods of Native.kt, compiled, and the header that belongs to them."""
    if java_home() is None:
        pytest.skip("no JDK is installed")
    folder = tmp_path_factory.mktemp("java")
    package = folder / "dev" / "transom" / "edge"
    package.mkdir(parents=True)
    methods = "".join(
        f"    public static native {result} {name}({', '.join(f'{kind} a{i}' for i, kind in enumerate(kinds))});\n"
        for name, (kinds, result) in declared().items()
    )
    sources = {
        "Native": f"public class Native {{\n{methods}}}",
        "Sink": "public interface Sink { boolean onText(String text); }",
        "TransomException": "public class TransomException extends RuntimeException {"
        " public TransomException(String message) { super(message); } }",
    }
    for name, text in sources.items():
        (package / f"{name}.java").write_text(f"package dev.transom.edge;\n{text}\n")
    probe = Path(__file__).parent / "java" / "Probe.java"
    files = [*map(str, sorted(package.glob("*.java"))), str(probe)]
    run(["javac", "-h", str(folder / "headers"), "-d", str(folder / "classes"), *files])
    return folder


def test_the_manifest_is_xml_and_names_the_dsps_library() -> None:
    name = "{http://schemas.android.com/apk/res/android}name"
    root = ElementTree.parse(APP / "AndroidManifest.xml").getroot()
    assert [one.get(name) for one in root.iter("uses-native-library")] == ["libcdsprpc.so"]
    activity = next(root.iter("activity")).get(name)
    assert activity is not None
    assert (KOTLIN / f"{activity.removeprefix('.')}.kt").exists()


def test_paths_and_names_of_the_project_are_there() -> None:
    gradle = (PROJECT / "app" / "build.gradle.kts").read_text()
    path = re.search(r'path = file\("([^"]+)"\)', gradle)
    assert path is not None
    cmake = PROJECT / "app" / path[1]
    edge = re.search(r"add_subdirectory\((\S+) edge\)", cmake.read_text())
    assert edge is not None
    assert (cmake.parent / edge[1]).resolve() == SOURCES
    namespace = re.search(r'namespace = "([^"]+)"', gradle)
    assert namespace is not None
    for file in KOTLIN.glob("*.kt"):
        assert file.read_text().startswith(f"package {namespace[1]}\n")
    assert "useLegacyPackaging = true" in gradle
    assert 'abiFilters += "arm64-v8a"' in gradle
    properties = (PROJECT / "gradle.properties").read_text()
    for version in re.findall(r"val (\w+): String by project", gradle):
        assert re.search(rf"^{version}=\d", properties, re.MULTILINE)


def test_every_native_method_has_its_function() -> None:
    bridge = (APP / "cpp" / "transom_jni.cpp").read_text()
    functions = re.findall(r"JNICALL Java_dev_transom_edge_Native_(\w+)\(", bridge)
    assert sorted(functions) == sorted(declared())
    kotlin = (KOTLIN / "Transom.kt").read_text()
    assert set(re.findall(r"Native\.(\w+)\(", kotlin)) == set(declared())
    assert 'System.loadLibrary("transom_jni")' in kotlin


def test_functions_take_what_methods_pass(classes: Path) -> None:
    home = java_home()
    assert home is not None
    header = next((classes / "headers").glob("*Native.h"))
    includes = [home / "include", home / "include" / "linux", *unpacked("usr", "include")[1:]]
    run([
        *("c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-include", str(header)),
        *(f"-I{SOURCES / 'src'}", *(word for path in includes for word in ("-isystem", str(path)))),
        str(APP / "cpp" / "transom_jni.cpp"),
    ])  # fmt: skip


@pytest.mark.sweep  # a Java machine
def test_the_bridge_answers_a_java_program(
    built: Path, classes: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Text goes in and comes out whole, emoji too; errors become exceptions; a second answer begins afresh."""
    model = tiny(rng)
    # Of one token each: characters of one to four bytes
    alphabet = [chr(code) for start in (0x61, 0x3B1, 0x4E00, 0x1F600) for code in range(start, start + 24)]
    tokenizer = Tokenizer(models.BPE({text: token for token, text in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.Fuse()
    files = {
        "onnx/model.onnx": genai_graph(model),
        "tokenizer.json": tokenizer.to_str().encode(),
        "generation.json": b'{"eos_ids": []}',
    }
    write_bundle(tmp_path / "b", [variant("onnx", "onnx", {"model.onnx": "onnx/model.onnx"}, context=40)], files)
    prompt = [int(token) for token in rng.integers(len(alphabet), size=6)]
    answer = "".join(alphabet[token] for token in greedy(lambda ids: reference(model, ids), prompt, 12))
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "b", damaged)
    Path(os.fsdecode(bytes(damaged) + b"/\xf0\x9f\x99")).touch()  # a name that is no UTF-8
    words = [built / "libtransom_jni.so", tmp_path / "b", onnxruntime_library(), "".join(alphabet[t] for t in prompt)]
    words.append(damaged)
    home = java_home()
    assert home is not None
    line = [str(home / "bin" / "java"), "-Xcheck:jni", "-Dfile.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8"]
    line += ["-cp", str(classes / "classes"), "Probe", *map(str, words)]
    done = subprocess.run(
        line, capture_output=True, encoding="utf-8", check=False, env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("judge onnx: fits. ")
    assert said[1:] == [
        "variant onnx",
        f"answer length {answer}",
        f"answer length {answer}",
        "stopped cancelled 3",
        "passed on of the sink",
        "refused --temperature is 1000.000000. Give a number from 0.000000 to 100.000000.",
        "refused /nowhere/🙂 is not a folder. Give the folder that transom export wrote.",
        f"refused The bundle {damaged} is damaged: \ufffd is not in the manifest. "
        "Copy it again from where it was made, or export the model again.",
    ]


@pytest.mark.sweep  # links the whole library for Android
def test_the_bridge_has_pages_of_16_kb(built: Path) -> None:
    library = built / "libtransom_jni.so"
    if not library.exists() or shutil.which("readelf") is None:
        pytest.skip("no JDK, or no readelf, is installed")
    loads = re.findall(r"^\s*LOAD.*(0x[0-9a-f]+)$", run(["readelf", "-lW", str(library)]), re.MULTILINE)
    assert loads
    assert all(int(align, 16) >= 16384 for align in loads)
