"""The program around its commands: exit codes, errors, progress."""

import subprocess
import sys

import pytest

import tpllm
from tpllm.cli import main


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("max_model_len=1\nis wrong"), 2),
        (FileNotFoundError("no such folder"), 2),
        (PermissionError("not yours"), 2),
        (OSError("no space left"), 1),
    ],
)
def test_an_error_is_one_line_on_stderr(llm, capsys, error, code):
    llm.error = error
    assert main(["generate", "hi", "--quiet"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"tpllm: error: {' '.join(str(error).split())}\n")
    assert llm.made["closed"]


def test_a_worker_s_report_keeps_its_lines(llm, capsys):
    llm.error = tpllm.WorkerError("worker rank 1 failed:\nTraceback\n  line", rank=1)
    assert main(["generate", "hi", "--quiet"]) == 1
    assert capsys.readouterr().err == f"tpllm: error: {llm.error}\n"


def test_debug_shows_the_traceback_too(llm, capsys):
    llm.error = ValueError("wrong")
    assert main(["generate", "hi", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("tpllm: error: wrong\n")


def test_an_error_of_the_start_names_where_the_setting_came_from(llm, capsys, monkeypatch):
    monkeypatch.setenv("TPLLM_TENSOR_PARALLEL_SIZE", "3")
    llm.start_error = ValueError("tensor_parallel_size=3 does not divide num_heads=16")
    assert main(["generate", "hi", "--quiet", "--dtype", "float32"]) == 2
    assert capsys.readouterr().err == (
        f"tpllm: error: {llm.start_error} "
        "(tensor_parallel_size is from TPLLM_TENSOR_PARALLEL_SIZE)\n"
    )


def test_ctrl_c_ends_quietly(llm, capsys):
    llm.error = KeyboardInterrupt()
    assert main(["generate", "hi", "--quiet"]) == 130
    assert capsys.readouterr().err == ""


def test_each_phase_of_the_start_is_told_once(llm, capsys):
    assert main(["generate", "hi"]) == 0
    out, err = capsys.readouterr()
    told = [line.split(" s  ") for line in err.splitlines()]
    assert [phase for _, phase in told] == [
        "starting",
        "importing torch",
        "loading weights",
        "ready",
    ]
    assert all(time.startswith("tpllm:") for time, _ in told)
    assert "tpllm:" not in out


def test_a_start_that_fails_is_never_ready(llm, capsys):
    llm.start_error = ValueError("wrong")
    main(["generate", "hi"])
    assert "ready" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, message",
    [
        (
            "--max-num-seqs 0",
            "max_num_seqs=0 must be at least 1 (max_num_seqs is from --max-num-seqs)",
        ),
        (
            "--max-num-seqs x",
            "max_num_seqs='x' must be a whole number (max_num_seqs is from --max-num-seqs)",
        ),
        ("--seed x", "seed='x' must be a whole number"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(llm, capsys, flag, message):
    assert main(["generate", "hi", *flag.split()]) == 2
    assert capsys.readouterr().err == f"tpllm: error: {message}\n"
    assert llm.made == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND (see tpllm --help)"),
        (["generate"], "the following arguments are required: PROMPT (see tpllm generate --help)"),
        (["generate", "hi", "--nonsense"], "unrecognized arguments: --nonsense (see tpllm"),
        (["generate", "hi", "--max-tok", "5"], "unrecognized arguments: --max-tok 5 (see tpllm"),
        (["bench"], "the following arguments are required: COMMAND (see tpllm bench --help)"),
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tpllm: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["generate", "chat", "serve", "info", "bench seed", "bench serve"]
)
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"Example:\n  tpllm {command}" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_ends_it_without_a_word():
    code = "from tpllm.cli import main; import sys; sys.exit(main(['info', '--device', 'cpu']))"
    run = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode in (0, 1)  # 0 where it was faster than its reader


def test_python_m_tpllm_is_the_same_program_and_loads_no_torch():
    code = (
        "import sys; from tpllm.cli import main\n"
        "try: main(['--version'])\n"
        "finally: print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"tpllm {tpllm.__version__}\n")
    assert not {"torch", "transformers", "triton"} & set(run.stdout.split())
    again = subprocess.run(
        [sys.executable, "-m", "tpllm", "--version"], capture_output=True, text=True, check=True
    )
    assert again.stdout == f"tpllm {tpllm.__version__}\n"
