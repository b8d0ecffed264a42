"""`genrec status`, `report` and `recommend`: they need the run folder only."""

from __future__ import annotations

import json

from genrec_dist.artifacts.files import append_jsonl


def status(cli, name: str) -> dict:
    done = cli("status", name, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_finished_run(cli) -> None:
    cli("run", "a.yaml", "--name", "plain")
    found = status(cli, "plain")
    assert (found["state"], found["exit_code"], found["error"]) == ("finished", 0, None)
    assert [(s["stage"], s["state"]) for s in found["stages"]] == [
        ("catalog", "built"),
        ("model", "built"),
        ("evaluation", "built"),
    ]
    assert found["metrics"]["main"]["test"]["ndcg@20"] == 0.2
    assert found["latest"]["loss"] == 0.5
    text = cli("status", "plain").stdout
    assert "plain: finished" in text
    assert "Recall@10" in text
    by_path = cli("status", str(cli.run_folder("plain")), "--json")
    assert json.loads(by_path.stdout) == found


def test_failed_run(cli) -> None:
    cli("run", "a.yaml", "--name", "data_error")
    found = status(cli, "data_error")
    assert (found["state"], found["exit_code"]) == ("failed", 3)
    assert "too many broken lines" in found["error"]
    assert [s["state"] for s in found["stages"]] == ["built", "stopped", "waiting"]
    text = cli("status", "data_error").stdout
    assert "failed" in text
    assert "driver.log" in text


def test_running_then_killed(cli, wait_for) -> None:
    process = cli.start("run", "a.yaml", "--name", "slow")
    wait_for(cli.in_work)
    found = status(cli, "slow")
    assert (found["state"], found["pid"]) == ("running", process.pid)
    current = found["stages"][1]
    assert current["state"] == "building"
    assert (current["progress"]["done"], current["progress"]["total"]) == (1, 4)
    assert found["latest"] == {"stage": "model", "split": "train", "step": 1, "loss": 0.25}
    assert "1 of 4 steps" in cli("status", "slow").stdout
    process.kill()
    process.communicate()
    found = status(cli, "slow")
    assert (found["state"], found["exit_code"], found["error"]) == ("interrupted", None, "its process is gone")
    assert found["stages"][1]["state"] == "stopped"


def test_a_run_of_another_machine_or_a_reused_process_id_is_not_running(cli, wait_for) -> None:
    process = cli.start("run", "a.yaml", "--name", "slow")
    wait_for(cli.in_work)
    events = cli.events("slow")
    own = next(e for e in events if e["event"] == "process")
    for name, change in (("other", {"host": "elsewhere"}), ("reused", {"created": own["created"] - 100})):
        folder = cli.run_folder(name)
        folder.mkdir()
        (folder / "config.yaml").write_text("name: x\n")
        for event in events:
            append_jsonl(folder / "events.jsonl", event | (change if event["event"] == "process" else {}))
        assert status(cli, name)["state"] == "interrupted"
    assert "elsewhere" in status(cli, "other")["error"]
    process.kill()
    process.communicate()


def test_only_the_last_call_counts(cli, wait_for) -> None:
    process = cli.start("run", "a.yaml", "--name", "slow")
    wait_for(cli.in_work)
    process.kill()
    process.communicate()
    cli("run", "a.yaml", "--name", "slow")
    found = status(cli, "slow")
    assert found["state"] == "finished"
    assert [s["state"] for s in found["stages"]] == ["reused", "built", "built"]


def test_unknown_run_names_the_known_ones(cli) -> None:
    cli("run", "a.yaml", "--name", "plain")
    done = cli("status", "plane")
    assert done.returncode == 2
    assert "plain" in done.stderr


def test_report_is_written_again(cli) -> None:
    cli("run", "a.yaml", "--name", "plain")
    report = cli.run_folder("plain") / "report.html"
    report.unlink()
    done = cli("report", "plain")
    assert (done.returncode, done.stdout) == (0, f"{report}\n")
    assert report.exists()


def test_recommend_prints_ids_scores_titles_and_nothing_else(cli) -> None:
    cli("run", "a.yaml", "--name", "plain")
    done = cli("recommend", "plain", "--history", "A1, A2", "--top-k", "3", "--json")
    assert [item["item_id"] for item in json.loads(done.stdout)] == ["B0", "B1", "B2"]
    text = cli("recommend", "plain", "--history", "A1,A2", "--top-k", "3")
    assert "after A2" in text.stdout
    assert "NOISE" not in text.stdout + text.stderr
    empty = cli("recommend", "plain", "--history", " , ")
    assert empty.returncode == 2
    assert "--history" in empty.stderr
