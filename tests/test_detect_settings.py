"""find_spheres without values, without room, without float64, and on sharded models."""

import socket
import warnings

import pytest
import torch
from detection_zoo import BN, CASES, LN, Net, conv, conv_norm, image, lin_norm, rows, seq
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from sphereopt.detect import copying, find_spheres


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Without the values of an index the rows of an embedding cannot be told apart: one sphere, coarser.
META = {**{name: case[2] for name, case in CASES.items()}, "embedding_ln": {"0.weight": "tensor"}}


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
@pytest.mark.parametrize("name", CASES)
def test_the_symbolic_part_alone_agrees(name):
    build, data, _ = CASES[name]
    model = build().to("meta")
    report = find_spheres(model, data())
    single = {n: s for n, s in report.spheres.items() if type(n) is str and report[n].shape[1:]}
    assert single == META[name], str(report)
    assert "meta device" in report.notes[0]
    assert all(finding.evidence is None for finding in report.values())
    assert all(p.is_meta for p in model.parameters())


def test_no_room_for_any_copy(monkeypatch):
    model = conv_norm(BN(6), nn.ReLU())
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(copying, "_free_memory", lambda device: 1)
    report = find_spheres(model, image())
    assert report.spheres == {"0.weight": "row"}
    assert "No room" in report.notes[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_no_room_for_float64(monkeypatch):
    model = conv_norm(BN(6), nn.ReLU())
    size = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(copying, "_free_memory", lambda device: 6 * size)
    report = find_spheres(model, image())
    assert report.spheres == {"0.weight": "row"}
    assert "float32" in report.notes[0]
    assert 1e-12 < report["0.weight"].evidence.euler < 1e-4


def only_single(x):
    """A stand-in for kernels that exist in single precision only."""
    if x.dtype == torch.float64:
        raise RuntimeError("\"grouped_kernel\" not implemented for 'Double'")
    return x


def test_kernels_without_float64():
    model = seq(nn.Linear(8, 6, bias=False), Net(lambda s, x: only_single(x)), LN(6))
    model.append(nn.Linear(6, 2))
    report = find_spheres(model, rows())
    assert report.spheres == {"0.weight": "tensor"}
    assert "does not run in float64" in report.notes[0]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_spheres(model, rows()[:, :3])


@pytest.mark.parametrize("shape", ["fp16", "channels_last", "frozen"])
def test_however_the_model_is_kept(shape):
    model, x = conv_norm(nn.GroupNorm(2, 8), nn.ReLU(), n=8), image()
    if shape == "fp16":
        model, x = model.half(), x.half()
    elif shape == "channels_last":
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    else:
        model.requires_grad_(False)
    assert find_spheres(model, x).spheres == {"0.weight": "block:2"}


def recurrent(kind):
    def forward(s, x):
        return s.h(s.n(s.r(x)[0]))

    return Net(forward, r=kind(8, 6, batch_first=True), n=LN(6), h=nn.Linear(6, 2))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks(kind):
    """tanh and gates break everything but a projection without them."""
    report = find_spheres(recurrent(kind), torch.randn(3, 5, 8))
    assert not any(name.startswith("r.") for name in report.spheres)


def _sharded(rank, world, port):
    warnings.simplefilter("ignore")
    from torch.distributed.fsdp import fully_shard

    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        model = seq(seq(conv(), BN(6), nn.ReLU()), nn.Flatten(), nn.Linear(150, 3, bias=False))
        model.append(nn.LayerNorm(3, elementwise_affine=False))
        x = torch.randn(4, 3, 7, 7)
        whole = find_spheres(model, x)
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        local = [p.to_local().clone() for p in model.parameters()]
        report = find_spheres(model, x)
        assert report.spheres == whole.spheres
        assert report.spheres["0.0.weight"] == "row"
        assert report.spheres["2.weight"] == "tensor"
        assert report["0.0.weight"].shape == (6, 3, 3, 3)  # the global shape
        after = [p.to_local() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(local, after, strict=True))
        model(x).sum().backward()  # and its hooks still work
        dist.barrier()  # a process that ends while the other one still sends aborts that one
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_fully_sharded_models():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_sharded, args=(2, port), nprocs=2)


def test_data_parallel_and_tied():
    model = Net(lambda s, x: F.linear(s.n(s.e(x)), s.e.weight), e=nn.Embedding(6, 8), n=LN(8))
    assert find_spheres(nn.DataParallel(model), torch.arange(6)).spheres == {}
    assert find_spheres(lin_norm(LN(6)), rows()).spheres == {"0.weight": "tensor"}
