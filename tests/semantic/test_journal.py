"""The journal tells a text that kills engines from a worker that was killed."""

from __future__ import annotations

from genrec_dist.semantic.journal import BATCH_DEATHS, TEXT_DEATHS, CrashJournal


def test_a_batch_is_suspect_after_it_died_again_and_again(tmp_path):
    path = tmp_path / "7.json"
    for death in range(BATCH_DEATHS):
        journal = CrashJournal(path)
        assert not journal.is_suspect([4, 5]), death
        journal.begin([4, 5])  # and the process is gone
    journal = CrashJournal(path)
    assert journal.is_suspect([4, 5])
    for death in range(TEXT_DEATHS):
        journal = CrashJournal(path)
        assert not journal.is_suspect([5]), death
        journal.begin([4])
        journal.begin([5])
    journal = CrashJournal(path)
    assert journal.is_suspect([5])
    assert not journal.is_suspect([4])


def test_what_ended_well_is_not_blamed(tmp_path):
    journal = CrashJournal(tmp_path / "7.json")
    journal.begin([1, 2])
    journal.begin([3, 4])
    journal.end()
    assert CrashJournal(tmp_path / "7.json").deaths == {}
    journal.close()
    assert not (tmp_path / "7.json").exists()


def test_deaths_count_only_on_end(tmp_path):
    path = tmp_path / "7.json"
    for _ in range(5):  # killed from outside: now with this batch in the engine, now with the next
        CrashJournal(path).begin([1, 2])
        journal = CrashJournal(path)
        journal.begin([1, 2])
        journal.begin([3])
    assert CrashJournal(path).deaths == {"3": 5}
    journal = CrashJournal(path)
    journal.begin([3])
    journal.end()
    assert CrashJournal(path).deaths == {}


def test_an_engine_that_dies_without_its_process_counts(tmp_path):
    journal = CrashJournal(tmp_path / "7.json")
    for _ in range(BATCH_DEATHS):
        journal.begin([1, 2])
        journal.died()
    assert journal.is_suspect([1, 2])


def test_a_damaged_journal_is_an_empty_one(tmp_path):
    (tmp_path / "7.json").write_text("{half")
    assert CrashJournal(tmp_path / "7.json").deaths == {}
