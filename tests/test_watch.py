"""A page that follows its runs: refreshed while they go on, whole and still at the end, honest about the abandoned."""

import json
import os
import socket
import threading
import time

import pytest
from small import metrics, small_config, trained

import fastarat
from fastarat.cli import main
from fastarat.report import report, watch as module
from fastarat.report.page import refresh_line
from fastarat.report.watch import watch
from fastarat.training import Trainer

QUICK = {"epochs": 3, "limit_train": 64}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("watch") / "run", **QUICK)


def pages(monkeypatch) -> list[bool]:
    """Whether each page that is written reloads itself; they hold nothing else."""
    seen = []

    def report(runs, out=None, *, refresh_s=None, **options):
        page = runs[0] / "report.html"
        page.write_text("whole" if refresh_s is None else f"whole{refresh_line(refresh_s)}")
        seen.append(refresh_s is not None)
        return page

    monkeypatch.setattr(module, "report", report)
    return seen


def test_a_running_run_is_followed_to_its_end(tmp_path, monkeypatch, capsys):
    seen, own, failed = pages(monkeypatch), Trainer._epoch, []

    def slowly(self, *args):
        time.sleep(0.5)
        return own(self, *args)

    monkeypatch.setattr(Trainer, "_epoch", slowly)
    run = tmp_path / "run"

    def training() -> None:
        try:
            fastarat.train(small_config(run, **QUICK), progress=False)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=training)
    thread.start()
    while not (run / "config.yaml").exists():
        assert thread.is_alive()
        time.sleep(0.02)
    page = watch([run], every=0.1)
    thread.join()
    assert not failed
    assert seen[-1] is False
    assert 3 <= seen.count(True) + 1 <= 8
    assert page.read_text() == "whole"
    said = capsys.readouterr().out
    assert f"waiting for the first epoch of {run}" in said
    assert "(run epoch 3)" in said


def test_a_finished_run_is_one_page(done, capsys):
    assert main(["report", str(done), "--watch", "--every", "0.1", "--images", "2"]) == 0
    assert capsys.readouterr().out.count("wrote") == 1
    assert "http-equiv" not in (done / "report" / "report.html").read_text()


def unfinished(tmp_path, done):
    """A run of which an epoch is missing."""
    run = tmp_path / "run"
    run.mkdir()
    for file in done.iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("epochs: 3", "epochs: 4"))
    return run


def hold(run, pid: int) -> None:
    (run / ".lock").write_text(json.dumps({"pid": pid, "host": socket.gethostname(), "since": "", "doing": ""}))


def test_a_run_that_nobody_trains_ends_the_watch(tmp_path, done, monkeypatch, capsys):
    seen, run = pages(monkeypatch), unfinished(tmp_path, done)
    hold(run, 2**22 + 1)  # left by a kill
    assert main(["report", str(run), "--watch", "--every", "0.05"]) == 1
    said = capsys.readouterr().err
    assert f"{run}: not finished, and no process is training it: fastarat train --resume {run} goes on" in said
    assert seen == [True, False]
    assert len(metrics(run)) == 3


def test_ctrl_c_leaves_a_whole_page_that_stands_still(tmp_path, done, monkeypatch):
    seen, run = pages(monkeypatch), unfinished(tmp_path, done)
    hold(run, os.getpid())

    def interrupt(seconds):
        assert seconds == 7
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        watch([run], every=7, progress=False)
    assert seen == [True]
    assert (run / "report.html").read_text() == "whole"


def test_the_page_reloads_itself_while_it_is_asked_to(done):
    page = report([done], num_images=2, refresh_s=30).read_text()
    assert page.count('<meta http-equiv="refresh" content="30">') == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--watch", "--every", "0"], "--every 0: expected seconds"), (["--every", "5"], "--every is of --watch")],
)
def test_mistakes(argv, words, done, capsys):
    assert main(["report", str(done), *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(fastarat.UserError, match=r"holds no config.yaml and no last.pt"):
        watch([tmp_path])
