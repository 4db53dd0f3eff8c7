"""`dsv3 --help` answers at once: nothing heavy is imported for it."""

import subprocess
import sys
import time


def test_help_within_half_a_second():
    def once() -> float:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "dsv3_cli.main", "--help"], capture_output=True, text=True, check=True, timeout=60
        )
        assert "doctor" in done.stdout
        return time.perf_counter() - begin

    assert min(once() for _ in range(3)) < 0.5


def test_nothing_heavy_is_imported():
    heavy = ("torch", "pydantic", "megatron", "numpy", "matplotlib", "yaml")
    code = f"import sys; import dsv3_cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
