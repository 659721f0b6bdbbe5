"""How the main job runs its steps."""

from __future__ import annotations

import sys
import time

import pytest

from lab import demo


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failed_step_ends_the_job_with_its_code() -> None:
    with pytest.raises(demo.StepError, match=r"Step failed \(exit code 3\)") as error:
        demo.run("Step", python("raise SystemExit(3)"))
    assert error.value.code == 3
    assert demo.run("Step", python("raise SystemExit(3)"), check=False) == 3


def test_two_steps_run_at_once_and_the_quiet_one_is_shown_when_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    pause = "import time; time.sleep(2); print('done')"
    started = time.monotonic()
    demo.run_beside("Loud", python(pause), "Quiet", python(pause))
    assert time.monotonic() - started < 3.8
    assert capfd.readouterr().out == "done\n"

    with pytest.raises(demo.StepError, match="Quiet failed"):
        demo.run_beside("Loud", python(""), "Quiet", python("print('why it failed'); raise SystemExit(2)"))
    assert "why it failed" in capfd.readouterr().err


def test_the_step_beside_a_failed_one_is_ended() -> None:
    started = time.monotonic()
    with pytest.raises(demo.StepError, match="Loud failed"):
        demo.run_beside("Loud", python("raise SystemExit(1)"), "Quiet", python("import time; time.sleep(30)"))
    assert time.monotonic() - started < 10
