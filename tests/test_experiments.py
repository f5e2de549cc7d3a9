"""The experiments: their flags, data and records, and the main job's claims."""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest
import rich.console
import rich.table
import sklearn.datasets

from experiments import __main__ as command
from experiments.common import data
from experiments.common import devices
from experiments.common import flags
from experiments.common import parts
from experiments.common import records
from experiments.papers.adversaries import faults
from experiments.training import train
import figures

ROOT = pathlib.Path(command.__file__).parents[1]


def run(tmp_path, **settings):
    """The records of a `train` run, through a file as the command does it."""
    config = dataclasses.replace(train.Config(seeds=1, output=str(tmp_path)), **settings)
    return records.read(records.write(config.output, records.header("train", config), train.run(config)))


def parse(*arguments):
    return flags.parse(train.Config, arguments, program="train")


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_alone_lists_every_experiment_with_the_first_line_of_its_docstring(capsys):
    command.main([])
    assert re.search(
        rf"^  train +{re.escape(str(train.__doc__).splitlines()[0])}$", capsys.readouterr().out, re.MULTILINE
    )


def test_an_experiment_is_found_by_its_file_or_folder_alone(tmp_path, monkeypatch):
    (tmp_path / "room" / "folder").mkdir(parents=True)
    (tmp_path / "room" / "new.py").write_text('"""A new one.\n\nMore."""\nclass Config: ...\ndef run(config): ...\n')
    (tmp_path / "room" / "folder" / "__init__.py").write_text(
        '"""A folder."""\nclass Config: ...\ndef run(config): ...\n'
    )
    (tmp_path / "room" / "helper.py").write_text('"""What experiments share."""\ndef run(config): ...\n')
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert command.experiments() == {"folder": ("room.folder", "A folder."), "new": ("room.new", "A new one.")}


def test_an_unknown_experiment_fails_and_says_which_there_are():
    with pytest.raises(SystemExit, match=r"there is no experiment 'trian'; there are: .*train"):
        command.main(["trian"])


def test_no_number_is_cut_off_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    table = rich.table.Table("seconds of a step", "bytes that travel")
    table.add_row("1234.5678901", "123,456,789,012")
    command.show(rich.console.Group(table))
    assert {"1234.5678901", "123,456,789,012"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # not even a prefix
        (["more"], "unrecognized arguments: more"),
        (["--steps", "0"], "--steps: has to be at least 1, got 0."),
        (["--steps", "many"], "--steps: has to be of type int, got 'many'."),
        (["--learning_rate", "nan"], "has to be at least 0, got nan."),
        (["--wire", "one_bit,3_bit"], "--wire: has to be one of one_bit, two_bit, psum, got '3_bit'."),
        (["--runner", "tpu"], "--runner: has to be one of simulate, mesh, pmap, got 'tpu'."),
    ],
)
def test_flags_that_are_unknown_or_out_of_range_fail(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["train", *arguments])
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_every_field_is_a_flag_in_either_spelling():
    line = "--batch_size 4 --learning-rate 0.5 --optimizer lion,signum --validation --data-file mnist.npz"
    expected = train.Config(
        batch_size=4, learning_rate=0.5, optimizer=("lion", "signum"), validation=True, data_file="mnist.npz"
    )
    assert parse(*line.split()) == expected
    assert parse() == train.Config()


def test_help_tells_every_field_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    printed = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name}" in printed
        assert field.metadata["about"] in printed
    assert "what to compare (default: sgd,signum)" in printed


def test_a_fresh_process_trains_with_as_many_devices_as_workers(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    arguments = ["--workers", "3", "--steps", "4", "--seeds", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments", "train", *arguments],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    header, *rest = records.read(tmp_path / records.FILE)
    assert header["devices"] == 3
    assert {(record["optimizer"], record["wire"]) for record in rest} == {("sgd", "mean"), ("signum", "one_bit")}
    assert "bits per" in done.stdout
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_devices_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"`--workers 99` needs as many devices, found \d+: take `--runner simulate`"):
        devices.take(99)


# ---- parts of one experiment ----------------------------------------------------------------------------------------


def parse_parts(*arguments):
    return command.load("adversaries").parse(arguments, program="adversaries", output="results/adversaries")


def test_a_flag_goes_to_every_chosen_part_that_has_it():
    found = parse_parts("--parts", "faults,late", "--seeds", "2", "--delays", "0,3", "--output", "here")
    assert list(found.parts) == ["faults", "late"]
    assert found.parts["faults"] == faults.Config(seeds=2, output="here")
    assert (found.parts["late"].seeds, found.parts["late"].delays, found.output) == (2, (0, 3), "here")
    assert (found.workers, found.seeds) == (8, 2)
    assert list(parse_parts().parts) == ["liars", "faults", "late"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--parts", "liar"], "--parts: has to be one of liars, faults, late, got 'liar'."),
        (["--parts", "faults", "--delays", "1"], "unrecognized arguments: --delays 1"),  # another part's
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--parts", "faults", "--steps", "0"], "--steps: has to be at least 1, got 0."),
    ],
)
def test_flags_that_no_chosen_part_has_fail(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_parts(*arguments)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_help_tells_the_flags_of_every_part(capsys):
    with pytest.raises(SystemExit):
        parse_parts("--help")
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--parts", "part liars", "--adversaries", "--rate", "--delays"))


def test_parts_run_one_after_the_other_and_get_their_own_records_back():
    seen = {}

    def part(name):
        def plot(records, folder):
            seen[name] = records
            return [pathlib.Path(folder) / name]

        return types.SimpleNamespace(
            run=lambda config: iter([{"found": config}]), table=lambda records: rich.table.Table(name), plot=plot
        )

    both = parts.Together({"a": part("a"), "b": part("b")}, ("a", "b"), "")
    found = list(both.run(parts.Config({"a": 1, "b": 2}, "here")))
    assert found == [{"part": "a", "found": 1}, {"part": "b", "found": 2}]
    header = {"config": {"parts": {"a": {"x": 1}, "b": {"x": 2}}}}
    assert both.plot([header, *found], "here") == [pathlib.Path("here/a"), pathlib.Path("here/b")]
    assert seen == {name: [{"config": {"x": x}}, {"part": name, "found": x}] for name, x in (("a", 1), ("b", 2))}
    assert [table.columns[0].header for table in both.table([header, *found]).renderables] == ["a", "b"]


# ---- data -----------------------------------------------------------------------------------------------------------


def test_the_digits_are_split_as_every_number_in_this_project_assumes():
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)
    found = data.load("digits")
    assert found.train_images.shape == (1437, 8, 8, 1)
    assert found.test_images.shape == (360, 8, 8, 1)
    images = np.concatenate([found.train_images, found.test_images]).reshape(-1, 64)
    np.testing.assert_array_equal(images, (pixels / 16)[order].astype(np.float32))
    found_labels = np.concatenate([found.train_labels, found.test_labels])
    np.testing.assert_array_equal(found_labels, labels[order])


def test_tuning_never_sees_a_test_image():
    whole, tuning = data.load("digits"), data.hold_out(data.load("digits"))
    np.testing.assert_array_equal(np.concatenate([tuning.train_images, tuning.test_images]), whole.train_images)
    np.testing.assert_array_equal(np.concatenate([tuning.train_labels, tuning.test_labels]), whole.train_labels)
    assert len(tuning.test_labels) == 287


def test_batches_take_every_example_once_before_any_twice():
    found = data.batches(0, num_examples=12, batch_size=4, steps=7)
    assert found.shape == (7, 4)
    for epoch in (found[:3], found[3:6]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(12))
    np.testing.assert_array_equal(found, data.batches(0, 12, 4, 7))
    assert (found != data.batches(1, 12, 4, 7)).any()


def test_sorted_shards_show_a_worker_few_labels():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 20))
    seen = labels[data.sorted_batches(0, labels, num_workers=4, batch_size=5, steps=16)].reshape(16, 4, 5)
    assert [set(seen[:, worker].ravel()) for worker in range(4)] == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    shuffled = labels[data.batches(0, 160, 20, 16)].reshape(16, 4, 5)
    assert len(set(shuffled[:, 0].ravel())) > 4


def test_mnist_without_file_or_network_says_how_to_get_it(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", unreachable)
    with pytest.raises(
        SystemExit, match=r"`--dataset mnist` is not on this machine.*no route.*`--data_file mnist.npz`"
    ):
        command.main(["train", "--dataset", "mnist", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"No such file or directory: .*absent.npz"):
        command.main(["train", "--dataset", "mnist", "--data-file", "absent.npz", "--output", str(tmp_path)])


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
@pytest.mark.slow
def test_a_convolutional_network_trains_on_a_file_that_the_user_names(name, shape, tmp_path):
    rng = np.random.default_rng(0)
    written = {
        "x_train": rng.integers(0, 256, (8, *shape), np.uint8).squeeze(),
        "y_train": rng.integers(0, 10, 8),
        "x_test": rng.integers(0, 256, (3, *shape), np.uint8).squeeze(),
        "y_test": rng.integers(0, 10, (3, 1)),  # as Keras writes CIFAR-10
    }
    np.savez(tmp_path / "some.npz", **written)
    found = data.load(name, str(tmp_path / "some.npz"))
    np.testing.assert_allclose(
        found.train_images[..., 0].ravel() * 255, written["x_train"].reshape(8, *shape)[..., 0].ravel(), rtol=1e-6
    )
    np.testing.assert_array_equal(found.test_labels, written["y_test"].ravel())
    _, *rest = run(
        tmp_path,
        dataset=name,
        data_file=str(tmp_path / "some.npz"),
        runner="simulate",
        workers=2,
        batch_size=2,
        steps=2,
    )
    assert [record["step"] for record in rest] == [2, 2]
    assert np.isfinite([record["train_loss"] for record in rest]).all()


def test_a_file_without_the_four_arrays_is_an_error(tmp_path):
    np.savez(tmp_path / "some.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match=r"has to hold x_train, y_train, x_test and y_test: .*y_train"):
        data.load("mnist", str(tmp_path / "some.npz"))


def test_colours_of_openml_end_up_in_the_last_axis(monkeypatch):
    by_colour = np.stack([np.full((32, 32), 51 * colour) for colour in range(3)])
    found = by_colour.reshape(1, -1), np.array(["7"])
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *args, **kwargs: found)
    loaded = data.load("cifar10")
    assert loaded.train_labels.tolist() == [7]
    np.testing.assert_allclose(loaded.train_images[0, 5, 9], [0, 0.2, 0.4], rtol=1e-6)


# ---- the main job ---------------------------------------------------------------------------------------------------


def test_every_runner_gives_the_same_numbers(tmp_path):
    settings = {"steps": 20, "evaluate_every": 10, "seeds": 2}
    found = {runner: run(tmp_path / runner, runner=runner, **settings)[1:] for runner in train.RUNNERS}
    columns = {
        runner: {key: np.array([record[key] for record in rest]) for key in ("train_loss", "test_accuracy")}
        for runner, rest in found.items()
    }
    for one, other in itertools.combinations(train.RUNNERS, 2):
        for a, b in zip(found[one], found[other], strict=True):
            for key in ("optimizer", "wire", "seed", "step", "bits_per_parameter", "megabytes", "learning_rate"):
                assert a[key] == b[key]
        # Matrix products may differ in the last bit, and so, rarely, a vote: one step of one parameter.
        np.testing.assert_allclose(columns[one]["train_loss"], columns[other]["train_loss"], rtol=1e-3)
        np.testing.assert_allclose(columns[one]["test_accuracy"], columns[other]["test_accuracy"], atol=2.1 / 360)
    by_seed = columns["simulate"]["train_loss"].reshape(-1, 2)
    assert (np.abs(by_seed[:, 0] / by_seed[:, 1] - 1) > 1e-2).all()  # seeds do differ


@pytest.mark.parametrize("optimizer", ["adam", "signsgd", "lion"])
def test_every_optimizer_learns(optimizer, tmp_path):
    *_, last = run(tmp_path, optimizer=(optimizer,), runner="simulate", steps=100)
    assert last["test_accuracy"] > 0.85  # guessing is right one time in ten


def test_the_learning_rate_flag_is_the_learning_rate(tmp_path):
    *_, still = run(tmp_path, optimizer=("signum",), runner="simulate", steps=50, learning_rate=0.0)
    *_, moving = run(tmp_path, optimizer=("signum",), runner="simulate", steps=50, learning_rate=0.01)
    assert still["test_accuracy"] < 0.3
    assert moving["test_accuracy"] > 0.8


@pytest.mark.slow
def test_label_sorted_shards_mislead_a_vote_but_not_a_mean(tmp_path):
    settings = {"optimizer": ("sgd", "signum"), "runner": "simulate", "steps": 200}
    found = {shards: train.final(run(tmp_path, shards=shards, **settings)) for shards in ("shuffled", "sorted")}
    accuracy = {key: {name: ends[0]["test_accuracy"] for name, ends in runs.items()} for key, runs in found.items()}
    assert accuracy["sorted"]["signum", "one_bit"] < accuracy["shuffled"]["signum", "one_bit"] - 0.1
    assert accuracy["sorted"]["sgd", "mean"] > accuracy["shuffled"]["sgd", "mean"] - 0.03


@pytest.mark.slow
def test_a_vote_of_bits_is_as_accurate_as_a_mean_of_floats(tmp_path):
    found = train.final(run(tmp_path, optimizer=("sgd", "signum"), runner="simulate", seeds=3))
    accuracy = {name: statistics.mean(record["test_accuracy"] for record in ends) for name, ends in found.items()}
    assert accuracy["sgd", "mean"] >= 0.982  # a fair baseline
    assert accuracy["signum", "one_bit"] >= 0.982


@pytest.mark.slow
def test_over_ten_seeds_a_vote_of_bits_is_as_accurate_as_a_mean_of_floats(tmp_path):
    settings = {"optimizer": ("sgd", "signum", "signsgd"), "wire": ("one_bit", "two_bit")}
    found = train.final(run(tmp_path, runner="simulate", seeds=10, **settings))
    accuracy = {name: [record["test_accuracy"] for record in ends] for name, ends in found.items()}
    assert all(len(ends) == 10 for ends in accuracy.values())
    baseline = accuracy["sgd", "mean"]
    assert statistics.mean(baseline) >= 0.982  # a fair one
    for wire in ("one_bit", "two_bit"):
        signum, signsgd = accuracy["signum", wire], accuracy["signsgd", wire]
        assert statistics.mean(signum) >= 0.982
        assert statistics.mean(b - s for b, s in zip(baseline, signum, strict=True)) <= 0.006
        # Without momentum a vote falls short of both, so these bounds can be missed.
        assert statistics.mean(signsgd) < 0.982
        assert statistics.mean(b - s for b, s in zip(baseline, signsgd, strict=True)) > 0.006


def test_a_worker_sends_one_thirty_second_of_its_floats(tmp_path):
    settings = {"optimizer": ("sgd", "signum"), "wire": ("one_bit", "two_bit"), "runner": "simulate", "steps": 2}
    ends = train.final(run(tmp_path, **settings))
    num_params = 64 * 64 + 64 + 64 * 10 + 10
    bits = {wire: end["bits_per_parameter"] for (_, wire), (end,) in ends.items()}
    assert bits["mean"] == 2 * 7 / 8 * 32
    for wire, planes in (("one_bit", 1), ("two_bit", 2)):
        # At most a byte of padding for each of the 4 leaves, and for each of the 8 chunks.
        assert 0 <= bits[wire] - 2 * 7 / 8 * planes <= 2 * 7 / 8 * planes * 8 * (4 + 8) / num_params
    for (_, wire), (end,) in ends.items():
        assert end["megabytes"] == pytest.approx(bits[wire] / 8 * num_params * 8 * 2 / 1e6)


# ---- records --------------------------------------------------------------------------------------------------------


def test_a_header_says_how_the_records_came_about(tmp_path):
    header, *rest = run(tmp_path, optimizer=("signum",), runner="simulate", steps=2, seeds=3)
    restored = header["config"] | {key: tuple(header["config"][key]) for key in ("optimizer", "wire")}
    assert train.Config(**restored) == train.Config(
        optimizer=("signum",), runner="simulate", steps=2, seeds=3, output=str(tmp_path)
    )
    assert header["seeds"] == [0, 1, 2] == [record["seed"] for record in rest]
    assert header["cores"] == os.cpu_count()
    assert set(header["versions"]) >= {"python", "signopt", "jax", "optax", "flax"}
    assert header["platform"] == "cpu"


def test_an_interrupted_run_leaves_what_it_had_found(tmp_path):
    def interrupted():
        yield {"step": 1}
        assert len(records.read(tmp_path / records.FILE)) == 2  # on the disk while the run goes on
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write(str(tmp_path), {"experiment": "x"}, interrupted())
    assert records.read(tmp_path / records.FILE) == [{"experiment": "x"}, {"step": 1}]


def test_table_and_plot_need_nothing_but_records(tmp_path):
    header = {"config": {"dataset": "digits", "workers": 8, "steps": 20, "seeds": 2}}
    shared = {"optimizer": "signum", "wire": "one_bit", "bits_per_parameter": 1.75, "seconds": 3.0}
    rest = [
        shared | {"seed": seed, "step": step, "megabytes": step / 10, "test_accuracy": accuracy}
        for step, accuracies in ((10, (0.5, 0.7)), (20, (0.8, 0.9)))
        for seed, accuracy in enumerate(accuracies)
    ]
    read = json.loads(json.dumps([header, *rest]))
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(train.table(read))
    text = console.export_text()
    for cell in ("signum", "one_bit", "0.8500 ± 0.0707", "1.75", "2.00", "3.0", "2 seeds"):
        assert cell in text

    (figure,) = figures.drawn(train, read, tmp_path)
    assert figure.get_suptitle() == "digits, 8 workers, 2 seeds"
    by_step, by_megabytes = figure.axes
    np.testing.assert_allclose(by_step.lines[0].get_xydata(), [[10, 0.6], [20, 0.85]])
    np.testing.assert_allclose(by_megabytes.lines[0].get_xydata(), [[1, 0.6], [2, 0.85]])
    assert by_megabytes.get_xscale() == "log"


# ---- proximal steps -------------------------------------------------------------------------------------------------


def run_command(name, tmp_path, *arguments):
    """The records of any experiment, run by the command, which also draws its table and figures."""
    command.main([name, *arguments, "--output", str(tmp_path)])
    found = records.read(tmp_path / records.FILE)
    figures.drawn(command.load(name), found, tmp_path)
    return found


@pytest.mark.slow
def test_signprox_finds_the_minimum_of_the_lasso_and_the_prox_of_a_sign_does_not(tmp_path):
    short = ["--steps", "1500", "--looks", "2", "--workers", "2", "--seeds", "1"]
    found = run_command("signprox", tmp_path, "--parts", "known", "--problem", "lasso", *short)
    last = {record["method"]: record for record in found[1:]}  # of each method
    one_worker, naive = last["signprox, one worker"], last["prox of sign"]
    assert one_worker["gap"] < 1e-3 < 0.05 < naive["gap"]
    assert one_worker["support_errors"] == 0
    assert naive["nonzero"] == 100  # of 100: it sets nothing to zero
    voted, floats = last["signprox, voted"], last["proximal SGD, float32 mean"]
    # 100 bits in 2 chunks of whole bytes are 112.
    assert floats["bits_per_parameter"] / voted["bits_per_parameter"] == pytest.approx(32 * 100 / 112)


@pytest.mark.slow
def test_a_sparse_network_drops_more_for_a_stronger_penalty_and_keeps_it_dropped(tmp_path):
    short = ["--strengths", "0.2,5", "--steps", "60", "--refit_steps", "20", "--learning_rate", "0.01", "--seeds", "1"]
    found = run_command("signprox", tmp_path, "--parts", "network", "--groups", "pixels", "--validation", *short)[1:]
    curve = [record for record in found if record["kind"] == "pixels"]
    assert [record["strength"] for record in curve] == [0, 0.2, 5]
    dropped = [record["dropped"] for record in curve]
    assert dropped[0] == 0 < dropped[1] < dropped[2] == 1
    assert [sum(record["surviving_pixels"]) for record in curve] == [64 * (1 - share) for share in dropped]
    for record in curve:  # counted on the 287 held-out images, not on the 360 test images
        assert record["test_accuracy"] * 287 == pytest.approx(round(record["test_accuracy"] * 287), abs=1e-3)
    assert curve[0]["test_accuracy"] > 0.8 > 0.3 > curve[2]["test_accuracy"]  # biases are all that is left
    shares = {record["kind"]: record["share_of_one_bit_weights"] for record in found if "weights" in record["kind"]}
    assert shares == {"float weights": 0, "one_bit weights": 1}


@pytest.mark.slow
def test_low_rank_truths_and_constant_pieces_are_found_and_a_falling_step_size_stalls(tmp_path):
    small = ["--size", "12", "--rank", "1", "--condition", "1", "--points", "100", "--pieces", "3", "--seeds", "1"]
    found = run_command("signprox", tmp_path, "--parts", "arrays", *small, "--steps", "2000", "--looks", "2")[1:]
    ends = {(r["problem"], r["method"]): r for r in found if "gap_after_polish" in r}
    gap = {name: end["gap_after_polish"] / end["minimum"] for name, end in ends.items()}
    for problem in ("completion, condition 1", "denoising"):
        assert gap[problem, "signprox"] < 1e-8
    assert gap["completion, condition 1", "signprox, falling"] > 1e-7
    assert ends["completion, condition 1", "signprox"]["rank"] == 1
    smooth = ends["denoising", "signprox"]
    assert smooth["error"] < smooth["error_of_noisy"] / 2


@pytest.mark.slow
def test_the_proximal_part_times_every_program_as_often_as_asked(tmp_path):
    found = run_command(
        "wire", tmp_path, "--parts", "prox", "--parameters", "5000", "--points", "100,200", "--repeats", "3"
    )[1:]
    assert [len(record["seconds"]) for record in found] == [3] * (5 + 2 * 4)
    assert all(0 < second < 10 for record in found for second in record["seconds"])
    assert [r["size"] for r in found if r["kind"] == "step"] == [5000] * 5
    assert {r["size"] for r in found if r["kind"] == "total variation"} == {100, 200}
