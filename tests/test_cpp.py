"""The C++ tests under sanitizers: the CPU solver under AddressSanitizer and UBSan and, its threads, under ThreadSanitizer; the
arithmetic of the CUDA kernels on the host."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPING = "unexpected memory mapping"  # what ThreadSanitizer says where addresses are more random than it can follow

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def build(source: str, sanitizers: str, target: Path) -> Path:
    """A program of tests/cpp, with every warning an error and every finding of a sanitizer its end."""
    command = [
        *("c++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"),
        *(f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"),
        *(
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'csrc' / 'include'}",
            str(ROOT / "tests" / "cpp" / source),
            "-o",
            str(target),
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(program: Path) -> subprocess.CompletedProcess:
    """The program's end; with fixed addresses where ThreadSanitizer needs them, skipped where those cannot be had."""
    for prefix in ([], ["setarch", platform.machine(), "-R"]):
        ran = subprocess.run([*prefix, program], capture_output=True, text=True, timeout=120)
        if MAPPING not in ran.stderr and "failed to set personality" not in ran.stderr:
            return ran
    pytest.skip(f"ThreadSanitizer cannot run under this kernel: {ran.stderr.strip()}")


@pytest.mark.parametrize(
    ("source", "sanitizers"),
    [("test_gevp.cpp", "address,undefined"), ("test_gevp.cpp", "thread"), ("cuda_cores.cpp", "address,undefined")],
)
def test_nothing_is_found(source, sanitizers, tmp_path):
    ran = run(build(source, sanitizers, tmp_path / "program"))
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]


def test_a_race_would_be_found(tmp_path):
    """What the suite counts on: two threads that write one counter end the program."""
    source = "#include <thread>\nint n; int main() { std::thread a([] { ++n; }), b([] { ++n; }); a.join(); b.join(); }"
    (tmp_path / "race.cpp").write_text(source)
    ran = run(build(str(tmp_path / "race.cpp"), "thread", tmp_path / "race"))
    assert ran.returncode != 0
    assert "data race" in ran.stderr
