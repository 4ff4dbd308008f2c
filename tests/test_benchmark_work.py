"""What a process of the benchmark does in which order."""

from paragen.benchmark import rows, work


def test_a_fold_reads_all_conditions_first_and_then_holds_the_adapters_of_one_dataset_at_a_time(monkeypatch):
    done = []

    class Worker(work.Worker):
        def __init__(self):
            self.plan = None

        def condition_of(self, dataset):
            done.append(f"read {dataset}")
            return dataset

        def score(self, dataset, adapters, scored):
            done.append(f"score {dataset}: {', '.join(adapters)}")
            return {name: {} for name in adapters}

    def generated(generator, seed, known):
        done.append(f"make {known['generated']} {known['swapped']} {seed}")
        return {f"generated {seed}.0": {}}

    monkeypatch.setattr(work, "generated", generated)
    monkeypatch.setattr(work, "part_of", lambda dataset, scored, methods, facts: methods)
    monkeypatch.setattr(rows, "scored_rows", lambda plan, dataset: None)
    adapters, facts = {"A": {"mean": {}}, "B": {"mean": {}}}, {"A": {"other": "B"}, "B": {"other": "C"}}
    parts = Worker().scored_parts(adapters, facts, {0: None, 1: None})
    assert done == [
        "read A", "read B", "read C",
        "make A B 0", "make A B 1", "score A: mean, generated 0.0, generated 1.0",
        "make B C 0", "make B C 1", "score B: mean, generated 0.0, generated 1.0",
    ]  # fmt: skip
    assert not adapters and parts["A"] == {"mean": [{"run": ""}], "generated": [{"run": "0.0"}, {"run": "1.0"}]}
