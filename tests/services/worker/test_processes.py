"""Real worker processes with a tiny random Llama, over both transports."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import grpc
import pytest
import torch
from safetensors.torch import save_file

from baton.core.clock import MonotonicClock
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    Work,
)
from baton.core.worker_info import PROTOCOL_VERSION, Role
from baton.registry.directory import DirectoryRegistry
from baton.rpc.channel import open_channel
from baton.rpc.convert import delta_from_wire, request_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from kvtransfer.select import nixl_obstacle

START_S = 60.0
PROMPT = [(i * 37) % 300 for i in range(90)]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, LAYERS = 64, 4, 2, 16, 128, 320, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder with random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)

    def weight(rows, columns):
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    tensors = {
        "model.embed_tokens.weight": weight(VOCAB, HIDDEN),
        "lm_head.weight": weight(VOCAB, HIDDEN) * 4,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": weight(MLP, HIDDEN),
            f"{layer}.mlp.up_proj.weight": weight(MLP, HIDDEN),
            f"{layer}.mlp.down_proj.weight": weight(HIDDEN, MLP),
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Processes:
    """Starts worker processes and ends all of them."""

    def __init__(self, model, directory):
        self.registry_dir = directory / "registry"
        self.registry = DirectoryRegistry(self.registry_dir, clock=MonotonicClock())
        self._model = model
        self._directory = directory
        self.processes = []

    def spawn(self, role, transport, *options):
        command = [
            *(sys.executable, "-m", f"services.{role.value}"),
            *("--model", str(self._model), "--registry", str(self.registry_dir)),
            *("--set", "engine.dtype=float32", "--set", "engine.num_threads=1"),
            *("--set", "engine.kv_cache_bytes=4000000", "--set", "drain_s=3"),
            *("--set", f"transfer.transport={transport}", "--set", "engine.block_size=16"),
            *("--set", "engine.max_num_batched_tokens=32", *options),
        ]
        log = (self._directory / f"{role.value}-{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        self.processes.append(process)
        return process

    async def ready(self, number):
        """The registered workers by role, once there are `number`."""
        async with asyncio.timeout(START_S):
            async for snapshot in self.registry.watch():
                if len(snapshot) == number:
                    return {info.role: info for info in snapshot.values()}
                dead = [p.returncode for p in self.processes if p.poll() is not None]
                assert not dead, self.logs()
        raise AssertionError("unreachable")

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self._directory.glob("*.log")))

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(20)


@pytest.fixture
def processes(model, tmp_path):
    processes = Processes(model, tmp_path)
    yield processes
    processes.stop()


@contextlib.asynccontextmanager
async def session(address):
    channel = open_channel(address)
    call = WorkerStub(channel).Session()
    hello = pb.Hello(router_id="test", protocol_version=PROTOCOL_VERSION)
    await call.write(pb.RouterMessage(hello=hello))
    assert (await call.read()).HasField("welcome")
    yield call
    call.cancel()
    await channel.close()


async def collect(call, *request_ids):
    """Tokens and last delta of each request."""
    tokens = {request_id: [] for request_id in request_ids}
    ends = {}
    async with asyncio.timeout(30):
        while len(ends) < len(request_ids):
            message = await call.read()
            assert message is not grpc.aio.EOF
            for delta in map(delta_from_wire, message.step.deltas):
                if delta.request_id not in tokens:
                    continue
                tokens[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None or delta.timeline is not None:
                    ends[delta.request_id] = delta
    return tokens, ends


def request(name, work, peer=None, max_tokens=24, known=()):
    return pb.RouterMessage(
        submit=request_to_wire(
            GenerateRequest(
                RequestId(name),
                work,
                tuple(PROMPT),
                SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
                kv_source=peer,
                output_token_ids=tuple(known),
                deadline_s=30,
            )
        )
    )


def peer_of(info):
    return PeerRef(info.worker_id, info.epoch, info.address)


@pytest.mark.parametrize("transport", ["shm", pytest.param("nixl", marks=pytest.mark.nixl)])
async def test_two_processes_hand_over_and_agree_with_one(processes, transport):
    if transport == "nixl" and nixl_obstacle():
        pytest.skip(nixl_obstacle())
    for role in Role:
        processes.spawn(role, transport)
    infos = await processes.ready(2)
    assert {info.transport for info in infos.values()} == {transport}
    prefill, decode = infos[Role.PREFILL], infos[Role.DECODE]
    async with session(prefill.address) as on_prefill, session(decode.address) as on_decode:
        await on_decode.write(request("alone", Work.GENERATE))
        alone, _ = await collect(on_decode, "alone")
        await on_decode.write(request("handed", Work.DECODE, peer_of(prefill)))
        await on_prefill.write(request("handed", Work.PREFILL))
        first, _ = await collect(on_prefill, "handed")
        rest, ends = await collect(on_decode, "handed")
    assert len(set(alone["alone"])) > 4
    assert first["handed"] + rest["handed"] == alone["alone"]
    stats = ends["handed"].timeline.transfer
    assert stats.num_blocks == 6
    assert stats.num_bytes == 6 * decode.layout.block_bytes
    started_s = time.monotonic()
    for process in processes.processes:
        process.send_signal(signal.SIGTERM)
    codes = [await asyncio.to_thread(process.wait, 15) for process in processes.processes]
    assert codes == [0, 0], processes.logs()
    assert time.monotonic() - started_s < 8
    assert not await processes.registry.list()


@pytest.mark.parametrize("transport", ["shm", pytest.param("nixl", marks=pytest.mark.nixl)])
async def test_killed_prefill_process_is_a_quick_retryable_error(processes, transport):
    if transport == "nixl" and nixl_obstacle():
        pytest.skip(nixl_obstacle())
    for role in Role:
        processes.spawn(role, transport)
    infos = await processes.ready(2)
    prefill, decode = infos[Role.PREFILL], infos[Role.DECODE]
    names = [f"r{number}" for number in range(8)]
    async with session(prefill.address) as on_prefill, session(decode.address) as on_decode:
        # Nobody submits the other half of the first: its reader waits for a chunk.
        for name in names:
            await on_decode.write(request(name, Work.DECODE, peer_of(prefill), max_tokens=200))
        for name in names[1:]:
            await on_prefill.write(request(name, Work.PREFILL, max_tokens=200))
        await collect(on_prefill, names[1])
        os.kill(prefill.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        _, ends = await collect(on_decode, *names)
        assert time.monotonic() - killed_s < 5
        for end in ends.values():
            failed = (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
            assert failed or end.finish_reason is FinishReason.LENGTH, end
        assert ends["r0"].finish_reason is FinishReason.ERROR
        await on_decode.write(request("after", Work.GENERATE, max_tokens=5))
        _, ends = await collect(on_decode, "after")
        assert ends["after"].finish_reason is FinishReason.LENGTH
    await assert_all_blocks_back(decode.address)
    processes.processes.pop(0).wait(10)


async def first_tokens(call, request_id, number):
    """The first tokens of a running request, at least so many."""
    tokens = []
    async with asyncio.timeout(20):
        while len(tokens) < number:
            message = await call.read()
            for delta in map(delta_from_wire, message.step.deltas):
                if delta.request_id == request_id:
                    tokens += delta.token_ids
                    assert delta.finish_reason is None, "ended before it could move"
    return tokens


async def move(on_old, on_new, old, name, *, num_tokens):
    """Run a request on the old worker and ask the new one to take it over.

    Returns its tokens and whether it has moved: so small a model may generate more than the new
    worker has room for, or end, before the two get round to it.
    """
    await on_old.write(request(name, Work.GENERATE, max_tokens=num_tokens))
    known = await first_tokens(on_old, name, 5)
    takeover = request(name, Work.TAKEOVER, peer_of(old), max_tokens=num_tokens, known=known)
    await on_new.write(takeover)
    before, ends = await collect(on_old, name)
    tokens = known + before[name]
    after, ends_after = await collect(on_new, name)
    if ends[name].finish_reason is not None:
        assert ends_after[name].is_retryable and not after[name]
        return tokens, False
    assert after[name], "handed on and ended at once"
    return tokens + after[name], True


@pytest.mark.nixl
async def test_running_request_moves_to_another_process(processes):
    if nixl_obstacle():
        pytest.skip(nixl_obstacle())
    for role in Role:
        processes.spawn(role, "nixl")
    infos = await processes.ready(2)
    old, new = infos[Role.PREFILL], infos[Role.DECODE]
    num_tokens = 1500
    async with session(old.address) as on_old, session(new.address) as on_new:
        await on_old.write(request("alone", Work.GENERATE, max_tokens=num_tokens))
        alone, _ = await collect(on_old, "alone")
        has_moved = []
        for attempt in range(8):
            name = f"moved-{attempt}"
            tokens, moved = await move(on_old, on_new, old, name, num_tokens=num_tokens)
            assert tokens == alone["alone"]
            has_moved.append(moved)
            if sum(has_moved) == 2:
                break
        assert any(has_moved)
    await assert_all_blocks_back(old.address)
    await assert_all_blocks_back(new.address)


@pytest.mark.nixl
async def test_request_goes_on_when_the_worker_it_moves_to_is_killed(processes):
    if nixl_obstacle():
        pytest.skip(nixl_obstacle())
    for role in Role:
        processes.spawn(role, "nixl")
    infos = await processes.ready(2)
    old, new = infos[Role.PREFILL], infos[Role.DECODE]
    num_tokens = 400
    async with session(old.address) as on_old, session(new.address) as on_new:
        await on_old.write(request("alone", Work.GENERATE, max_tokens=num_tokens))
        alone, _ = await collect(on_old, "alone")
        await on_old.write(request("kept", Work.GENERATE, max_tokens=num_tokens))
        known = await first_tokens(on_old, "kept", 5)
        await on_new.write(
            request("kept", Work.TAKEOVER, peer_of(old), max_tokens=num_tokens, known=known)
        )
        os.kill(new.pid, signal.SIGKILL)
        rest, ends = await collect(on_old, "kept")
        assert ends["kept"].finish_reason is FinishReason.LENGTH
        assert known + rest["kept"] == alone["alone"]
    await assert_all_blocks_back(old.address)


async def assert_all_blocks_back(address):
    channel = open_channel(address)
    async with asyncio.timeout(10):
        while True:
            load = (await WorkerStub(channel).GetInfo(pb.GetInfoRequest())).load
            if load.free_blocks + load.cached_blocks == load.total_blocks:
                break
            await asyncio.sleep(0.05)
    assert (load.leases, load.reservations, load.quarantined_blocks) == (0, 0, 0)
    await channel.close()


@pytest.mark.parametrize("after_s", [0.4, 0.8, 1.5])
def test_signal_during_start_ends_the_process_at_once(processes, after_s):
    process = processes.spawn(Role.DECODE, "auto")
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    # Before the event loop runs, the signal's default action ends the process.
    assert process.wait(5) in (0, -signal.SIGTERM), processes.logs()
    assert "Traceback" not in processes.logs()


def test_worker_that_stays_unhealthy_ends_with_failure(processes):
    # No engine answers within a microsecond.
    options = [f"health.{o}" for o in ("ping_timeout_s=1e-6", "period_s=0.1", "max_bad_verdicts=3")]
    process = processes.spawn(Role.DECODE, "shm", *(a for o in options for a in ("--set", o)))
    assert process.wait(START_S) == 1, processes.logs()
    assert "3 bad verdicts in a row" in processes.logs()


def test_worker_ends_with_its_parent(processes, tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "command = [*sys.argv[1:], '--exit-with-parent', str(os.getpid())]\n"
        "child = subprocess.Popen(command)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [
        *(sys.executable, "-m", "services.decode", "--model", str(processes._model)),
        *("--set", "engine.kv_cache_bytes=4000000", "--set", "engine.num_threads=1"),
        *("--set", "transfer.transport=shm", "--registry", str(processes.registry_dir)),
    ]
    with (tmp_path / "parent.log").open("wb") as log:
        parent = subprocess.Popen(
            [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=log
        )
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    asyncio.run(processes.ready(1))
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    deadline_s = time.monotonic() + 10
    while os.path.exists(f"/proc/{child_pid}") and time.monotonic() < deadline_s:
        time.sleep(0.05)
    is_gone = not os.path.exists(f"/proc/{child_pid}")
    if not is_gone:
        os.kill(child_pid, signal.SIGKILL)
    assert is_gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere"], "config.json"),
        (["--set", "engine.wrong=1"], "unknown setting engine.wrong"),
        ([], "model_path"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_settings_end_the_process_with_one_readable_line(options, message):
    command = [sys.executable, "-m", "services.prefill", *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert message in process.stderr
    assert "Traceback" not in process.stderr
