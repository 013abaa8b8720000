"""The comparison run as a library: its data, its arms, what they must agree on."""

import errno
import gc
import gzip
import json
import math
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from sphereopt.groups import param_groups
from sphereopt.monitor import read_jsonl
from sphereopt.train import (
    Config,
    DivergedError,
    OptionError,
    fresh_folder,
    learning_rate,
    load,
    loop,
    predicted_angle,
    train,
)
from sphereopt.train.arms import ARMS, set_lr
from sphereopt.train.model import build_model

pytest.importorskip("sklearn")

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def results(folder):
    return train(Config(steps=STEPS), folder)


def idx(array, *, kind=8):
    header = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def made_up(n_train=24, n_test=7, size=(6, 5), seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n_train + n_test) % 3
    images = rng.integers(0, 200, size=(n_train + n_test, *size)) + 20 * labels[:, None, None]
    return {
        "train_images": images[:n_train].astype(np.uint8),
        "train_labels": labels[:n_train].astype(np.uint8),
        "test_images": images[n_train:].astype(np.uint8),
        "test_labels": labels[n_train:].astype(np.uint8),
    }


FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def write_idx(folder, arrays, *, gz=()):
    for key, name in FILES.items():
        if key in gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(arrays[key])))
        else:
            (folder / name).write_bytes(idx(arrays[key]))


# The arms


def test_free_follows_sgd(results):
    free = results.arms["free"]
    # float64 rounds at 1e-16 and the eps of 1e-12 counts as 1e-12 of a variance; 40 steps of
    # training multiply that by about 10. Any wrong factor in the update shows at 1e-3 or more.
    assert 0 < free.loss_gap < 1e-10
    assert 0 < free.norm_gap < 1e-10
    assert free.stored_drift < 1e-14
    start, end = free.norms[0], free.norms[-1]
    assert results.arms["sgd"].stored_drift > 0.1  # there was something to follow
    assert end.believed.q25 != pytest.approx(start.believed.q25, rel=0.01)
    assert end.stored.median == pytest.approx(start.stored.median, rel=1e-14)


def test_fixed_turns_by_the_predicted_angle(results):
    fixed = results.arms["fixed"]
    # rotate turns by lr exactly; 1e-12 is rounding in the angle's arctangent and the means.
    assert fixed.angle == pytest.approx(fixed.predicted_angle, rel=1e-12)
    assert fixed.stored_drift < 1e-14
    for (step, angle), (step_again, predicted) in zip(fixed.angles, results.predicted, strict=True):
        assert step == step_again
        assert angle == pytest.approx(predicted, rel=1e-12)


def test_arms_share_their_first_loss_and_learn(results):
    first = {arm.loss[0] for arm in results.arms.values()}
    assert max(first) - min(first) < 1e-14  # one model, one batch, before any step
    for arm in results.arms.values():
        assert len(arm.loss) == STEPS
        assert arm.loss[-1] < 0.6 * arm.loss[0]
        assert arm.test_accuracy > 0.5  # chance is 0.1


def test_norms_in_results_are_those_of_the_tracker(results, folder):
    rows = read_jsonl(folder / "free.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    last = rows[-1]["parameters"]
    pooled = [last[name]["norm"] for name in results.spheres]
    end = results.arms["free"].norms[-1].believed
    assert min(p["min"] for p in pooled) <= end.q25 <= end.median <= end.q75
    assert end.q75 <= max(p["max"] for p in pooled)
    assert results.sphere_count == sum(last[name]["count"] for name in last) == 56


def test_every_filter_is_found_and_the_rest_is_not(results):
    assert results.spheres == {f"conv{i}.weight": "row" for i in (1, 2, 3)}


def test_fixed_arm_decays_only_what_is_not_on_a_sphere():
    config = Config()
    model = build_model(1, 10, seed=0, dtype=torch.float64, norm_eps=1e-12)
    specs = {f"conv{i}.weight": "row" for i in (1, 2, 3)}
    optimizer = ARMS[2].build(param_groups(model, specs), config)
    set_lr(optimizer, 0, config)
    decay = {
        name: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert decay["conv1.weight"] == (0.0, predicted_angle(0, config))
    assert decay["head.weight"] == (config.weight_decay, config.lr)
    assert decay["norm1.weight"] == decay["head.bias"] == (0.0, config.lr)


def test_schedule():
    config = Config(steps=100, lr=1.0, weight_decay=0.05)
    assert learning_rate(0, config) == 1.0
    assert learning_rate(100, config) == pytest.approx(0.2)
    assert predicted_angle(0, config) == pytest.approx(math.acos(1 - 0.05 / 1.9))
    # The angle follows the root of the learning rate, to first order in lr*decay.
    ratio = predicted_angle(100, config) / predicted_angle(0, config)
    assert ratio == pytest.approx(math.sqrt(0.2), rel=0.01)


def test_free_follows_sgd_in_float32_until_an_activation_crosses_zero(tmp_path):
    results = train(Config(steps=20, dtype="float32"), tmp_path)
    free = results.arms["free"]
    # Rounding at 6e-8 of a loss of 2 gives 2e-7. Should one activation cross the kink of its ReLU
    # in one of the runs only (step 53 here), weights jump by 1e-5 and 20 steps make 1e-4 of it.
    assert free.loss_gap < 1e-3
    assert free.loss_gap != 0
    assert free.stored_drift < 1e-6  # 20 steps, each rounded at 6e-8


# What it leaves alone


def test_same_options_same_numbers_and_nothing_global_changes(results, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    again = train(Config(steps=STEPS), tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]
    for name, arm in again.arms.items():
        ignored = {"seconds": 0.0}
        assert replace(arm, **ignored) == replace(results.arms[name], **ignored)


def test_seed_changes_weights_and_batches(results, tmp_path):
    before = torch.get_num_threads()
    other = train(Config(steps=3, seed=1, threads=before + 1), tmp_path)
    assert torch.get_num_threads() == before
    assert other.arms["sgd"].loss[0] != results.arms["sgd"].loss[0]


def test_batches_are_epochs_without_repetition():
    config = Config(steps=7, batch_size=4)
    batches = list(loop._batches(10, config))
    assert [len(b) for b in batches] == [4] * 7
    for first, second in zip(batches[::2], batches[1::2], strict=False):
        assert len(set(torch.cat([first, second]).tolist())) == 8
    assert batches[0].tolist() != batches[2].tolist()


def test_initial_weights_do_not_depend_on_dtype():
    single, double = (
        build_model(1, 10, seed=3, dtype=d, norm_eps=1e-5) for d in (torch.float32, torch.float64)
    )
    for p, q in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(p, q.float())


def test_progress_is_told_every_step(tmp_path):
    told = []
    train(Config(steps=3), tmp_path, progress=lambda arm, step, loss: told.append((arm, step)))
    assert [(arm.name, step) for arm, step in told] == [
        (name, step) for name in ("sgd", "free", "fixed") for step in (1, 2, 3)
    ]


def test_jsonl_of_an_earlier_run_is_replaced(tmp_path):
    (tmp_path / "sgd.jsonl").write_text('{"step": 99}\n')
    (tmp_path / "notes.txt").write_text("mine")
    train(Config(steps=2), tmp_path)
    assert [row["step"] for row in read_jsonl(tmp_path / "sgd.jsonl")] == [1, 2]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_divergence_says_where(tmp_path):
    with pytest.raises(DivergedError, match=r"arm \([ab]\) is (nan|inf) at step \d+.*smaller lr"):
        train(Config(steps=30, lr=1e49, weight_decay=1e-59), tmp_path)
    read_jsonl(tmp_path / "sgd.jsonl")  # what was logged is still JSON


def test_results_are_json(results):
    data = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert data["config"]["steps"] == STEPS
    assert data["arms"]["free"]["norms"][0]["step"] == 0
    assert data["arms"]["sgd"]["accuracy"][-1][0] == STEPS


# Data


def test_digits_are_split_by_class_and_always_alike():
    digits, again = load("digits"), load("digits")
    assert torch.equal(digits.test_images, again.test_images)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.classes == 10
    train_counts = torch.bincount(digits.train_labels)
    test_counts = torch.bincount(digits.test_labels)
    share = test_counts / (train_counts + test_counts)
    assert ((share - 0.2).abs() < 0.01).all()  # of 174 to 183 images, rounded to whole ones
    normal = digits.normalized(digits.train_images, torch.float64)
    assert abs(float(normal.mean())) < 1e-12
    assert float(normal.std()) == pytest.approx(1)
    seen = {image.numpy().tobytes() for image in digits.train_images}
    repeated = sum(image.numpy().tobytes() in seen for image in digits.test_images)
    assert repeated == 0


@pytest.mark.parametrize("gz", [(), tuple(FILES), ("train_images",)])
def test_idx_folder(tmp_path, gz):
    arrays = made_up()
    write_idx(tmp_path, arrays, gz=gz)
    data = load(str(tmp_path))
    assert data.classes == 3
    assert data.train_images.dtype == torch.uint8
    assert np.array_equal(data.train_images[:, 0].numpy(), arrays["train_images"])
    assert np.array_equal(data.test_labels.numpy(), arrays["test_labels"])


@pytest.mark.parametrize("channels", [None, 3])
def test_npz(tmp_path, channels):
    arrays = made_up()
    if channels:
        arrays = {
            k: np.stack([v] * channels, axis=1) / 255 if "images" in k else v.astype(np.int32)
            for k, v in arrays.items()
        }
    np.savez(tmp_path / "own.npz", **arrays)
    data = load(str(tmp_path / "own.npz"))
    assert data.train_images.shape == (24, channels or 1, 6, 5)
    assert data.mean == pytest.approx(arrays["train_images"].mean())


def test_own_images_train(tmp_path):
    write_idx(tmp_path, made_up(), gz=("test_images",))
    results = train(Config(data=str(tmp_path), steps=4, batch_size=8), tmp_path / "out")
    assert results.data["image_shape"] == [1, 6, 5]
    assert results.arms["free"].loss_gap < 1e-11  # as above, in a tenth of the steps


def broken(change):
    arrays = made_up()
    change(arrays)
    return arrays


BROKEN = {
    "no test_labels": (lambda a: a.pop("test_labels"), "test_labels"),
    "lengths": (lambda a: a.update(train_labels=a["train_labels"][1:]), "24 train images but 23"),
    "flat": (lambda a: a.update(train_images=a["train_images"].reshape(24, -1)), "shape"),
    "sizes": (lambda a: a.update(test_images=a["test_images"][:, 1:]), "differ in size"),
    "blank": (lambda a: a.update(train_images=0 * a["train_images"]), "same value"),
    "infinite": (lambda a: a.update(train_images=a["train_images"] / 0.0), "finite"),
    "text": (lambda a: a.update(train_images=a["train_images"].astype(str)), "finite numbers"),
    "negative": (lambda a: a.update(train_labels=a["train_labels"] - 1.0), "integers"),
    "new class": (lambda a: a.update(test_labels=a["test_labels"] + 9), "go to 2"),
    "below zero": (lambda a: a.update(train_labels=a["train_labels"].astype(int) - 1), "from 0"),
    "empty": (lambda a: a.update(train_images=a["train_images"][:0]), "shape"),
    "pickled": (lambda a: a.update(train_labels=np.array([{}], dtype=object)), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_npz_that_does_not_fit(tmp_path, name):
    change, message = BROKEN[name]
    path = tmp_path / "own.npz"
    np.savez(path, **broken(change))
    with pytest.raises(OptionError, match=message) as caught:
        load(str(path))
    assert caught.value.option == "data"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\x00\x00\x0d\x03" + bytes(12), "not an idx file"),
        (idx(made_up()["train_images"])[:-1], "announces"),
        (b"\x00\x00\x08\x03\x00\x00", "cut off"),
    ],
)
def test_idx_that_does_not_parse(tmp_path, content, message):
    write_idx(tmp_path, made_up())
    (tmp_path / FILES["train_images"]).write_bytes(content)
    with pytest.raises(OptionError, match=message):
        load(str(tmp_path))


def test_idx_that_does_not_unpack(tmp_path):
    write_idx(tmp_path, made_up(), gz=tuple(FILES))
    path = tmp_path / f"{FILES['test_images']}.gz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OptionError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        load(str(tmp_path))


def test_not_an_npz(tmp_path):
    path = tmp_path / "own.npz"
    path.write_text("hello")
    with pytest.raises(OptionError, match="cannot be read"):
        load(str(path))


def test_an_npz_that_is_cut_off_is_refused_and_closed(tmp_path):
    """numpy leaves the handle it opened itself, and a ResourceWarning, behind."""
    path = tmp_path / "own.npz"
    np.savez(path, train_images=np.zeros((4, 8, 8)))
    path.write_bytes(path.read_bytes()[:-40])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(OptionError, match="cannot be read"):
            load(str(path))
        gc.collect()
    assert not caught


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("batch_size", 1),
        ("threads", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", math.inf),
        ("weight_decay", -1e-3),
        ("weight_decay", 2.0),
        ("norm_eps", 0.0),
        ("dtype", "float16"),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(OptionError) as caught:
        Config(**{option: value})
    assert caught.value.option == option
    assert caught.value.value == str(value)


def test_a_fresh_folder_has_nothing_of_an_earlier_run_and_all_else(tmp_path):
    out = tmp_path / "a" / "b"
    assert fresh_folder(out, ("run.jsonl",)) == out
    for name in ("run.jsonl", "notes.txt"):
        (out / name).write_text("x")
    fresh_folder(out, ("run.jsonl", "report.html"))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match=r"out='.*file': cannot write there \(.+\); choose"):
        fresh_folder(tmp_path / "file", ())

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("sphereopt.train.folder.TemporaryFile", read_only)
    with pytest.raises(OptionError, match="Read-only file system"):
        fresh_folder(tmp_path, ())
