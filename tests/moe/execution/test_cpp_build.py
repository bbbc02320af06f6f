"""Compiling on first use: once between processes, whole or not at all, and the compiler's own message."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from d2dmoe_pl.moe.execution._cpp_build import CompileError, load_extension

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    (tmp_path / "csrc").mkdir()
    file = tmp_path / "csrc" / "answer.cpp"
    file.write_text('extern "C" int answer() { return 42; }\n')
    return file


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch):
    """A compiler that notes in the file returned that it was started, and takes its time after writing half."""
    log = tmp_path / "log"
    script = tmp_path / "slow-c++"
    script.write_text(f'#!/bin/sh\necho started >> {log}\nsleep 1\nexec {shutil.which("c++")} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def wait_for(file):
    deadline = time.time() + 30
    while not file.exists():
        assert time.time() < deadline
        time.sleep(0.01)


def test_two_processes_at_once_compile_once(source, slow_compiler, tmp_path):
    processes = [FORK.Process(target=load_extension, args=("answer", source)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert slow_compiler.read_text() == "started\n"
    assert len(list((tmp_path / "cache").glob("*/*.so"))) == 1


def test_a_killed_compilation_is_done_again(source, slow_compiler):
    process = FORK.Process(target=load_extension, args=("answer", source))
    process.start()
    wait_for(slow_compiler)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    load_extension("answer", source)
    assert slow_compiler.read_text() == "started\nstarted\n"


def test_a_changed_header_is_compiled_again(source, slow_compiler):
    header = source.with_name("number.h")
    header.write_text("#define NUMBER 42\n")
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }\n')
    load_extension("answer", source)
    load_extension("answer", source)
    assert slow_compiler.read_text() == "started\n"
    header.write_text("#define NUMBER 43\n")
    load_extension("answer", source)
    assert slow_compiler.read_text() == "started\nstarted\n"


def test_the_compilers_own_message(source, tmp_path):
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(CompileError, match=r"answer\.cpp:1:23: error: .*forty_two"):
        load_extension("answer", source)
    assert not list((tmp_path / "cache").glob("*/*.so"))


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/bin/false", "/bin/false failed with exit code 1"),
        ("c++ 'unbalanced", "No closing quotation"),
        ("/no/such/c++", "[Errno 2] No such file or directory: '/no/such/c++'"),
    ],
)
def test_a_broken_compiler(source, monkeypatch, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        load_extension("answer", source)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Home and temporary folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


def libraries(folder):
    return list(folder.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_another(source, elsewhere):
    (elsewhere / "cache").write_text("a file, not a folder")
    load_extension("answer", source)
    assert len(libraries(elsewhere / "home")) == 1


def test_no_home_and_no_cache(source, elsewhere, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    load_extension("answer", source)
    assert len(libraries(elsewhere / "temporary")) == 1


def test_no_folder_at_all(source, elsewhere, monkeypatch):
    for name in ("cache", "home"):
        (elsewhere / name).write_text("a file, not a folder")
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere / "cache"))
    with pytest.raises(CompileError, match=r"^no folder for compiled libraries \(.*cache"):
        load_extension("answer", source)


def test_the_cache_is_the_users_alone(source, elsewhere, tmp_path):
    load_extension("answer", source)
    folder = libraries(tmp_path / "cache")[0].parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # others could have written it
    load_extension("answer", source)
    assert len(libraries(elsewhere / "home")) == 1


@pytest.mark.parametrize("damage", ["cut off", "emptied", "another", "not signed"])
def test_a_broken_library_is_compiled_anew(source, tmp_path, caplog, damage):
    load_extension("answer", source)
    library = libraries(tmp_path / "cache")[0]
    content = library.read_bytes()
    if damage == "not signed":
        library.with_suffix(".sha256").unlink()
    else:
        library.unlink()  # it is mapped into this process
        library.write_bytes({"cut off": content[:5000], "emptied": b"", "another": b"no library at all"}[damage])
    caplog.clear()
    load_extension("answer", source)
    assert library.read_bytes()[:4] == content[:4] == b"\x7fELF"
    assert any("is not as it was compiled: it is compiled anew" in record.message for record in caplog.records)


@pytest.mark.parametrize("compiler", ["", " "])
def test_no_compiler_named_is_the_usual_one(source, monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CXX", compiler)
    load_extension("answer", source)
    assert len(libraries(tmp_path / "cache")) == 1
