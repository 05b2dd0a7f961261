"""The costs of placement one worker and one pair at a time, in plain Python, as docs/routing.md
states them. What the vectors of `services.router.placement.scoring` are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from baton.core.worker_info import Role
from services.router.index.prefix_match import PrefixMatch
from services.router.placement.candidates import WorkerRow
from services.router.placement.load_book import Column
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import PlacementRequest
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.prefix_source import MAX_SOURCES
from services.router.placement.topology import Topology


@dataclass
class Cost:
    cached: float
    queue_s: float
    move_s: float
    compute_s: float
    window_s: float
    prefill: float
    decode: float
    itl_s: float
    missing: float
    local: float


@dataclass
class Reference:
    rows: list[WorkerRow]
    match: PrefixMatch
    request: PlacementRequest
    config: PolicyConfig
    perf: PerfModel
    topology: Topology

    def lengths(self, row: WorkerRow) -> list[int]:
        usable = (self.request.num_prompt_tokens - 1) // row.info.layout.block_size
        return [min(int(n), usable) for n in self.match.lengths[:, row.slot]]

    def link(self, reader: WorkerRow, source: WorkerRow) -> tuple[float, float]:
        """(seconds per byte, latency)"""
        seconds, latency = self.topology.costs(
            np.array([reader.index], np.intp), np.array([source.index], np.intp)
        )
        return float(seconds[0, 0]), float(latency[0, 0])

    def sources(self) -> list[WorkerRow]:
        """The longest, least leased first; no two may have as many leases."""
        found = [
            row
            for row in self.rows
            if row.is_readable and self.lengths(row)[0] >= self.config.min_offer_blocks
        ]
        found.sort(key=lambda row: (-self.lengths(row)[0], row.book.figures()[Column.LEASES]))
        return found[:MAX_SOURCES]

    def ways(self, row: WorkerRow) -> list[tuple[int, float]]:
        """(blocks, seconds to move them)"""
        config, block_bytes = self.config, row.info.layout.block_bytes
        device, host, disk = self.lengths(row)
        ways = [(device, 0.0)]
        host_s = (host - device) * block_bytes / config.host_tier_bytes_per_second
        host_s += config.fetch_s if host > device else 0.0
        disk_s = host_s + (disk - host) * block_bytes / config.disk_tier_bytes_per_second
        disk_s += config.fetch_s if disk > host else 0.0
        ways += [(host, host_s), (disk, disk_s)]
        for source in self.sources():
            more = self.lengths(source)[0] - disk
            if source is row or more < 1:
                continue
            per_byte, latency = self.link(row, source)
            fetch_s = config.fetch_s + latency + more * block_bytes * per_byte
            ways.append((disk + more, disk_s + fetch_s))
        return ways

    def cost(self, row: WorkerRow) -> Cost:
        request, config, info = self.request, self.config, row.info
        load = row.book.figures()
        num_tokens = request.num_prompt_tokens
        args = (info.role, info.worker_id)

        def compute(cached: float) -> float:
            return self.perf.prefill_s(
                args[0], int(num_tokens - cached), int(cached), worker_id=args[1]
            )

        block_size = info.layout.block_size
        whole = compute(0)
        options = [
            (move_s + compute(blocks * block_size), blocks * block_size, move_s)
            for blocks, move_s in self.ways(row)
        ]
        work_s, cached, move_s = min(options, key=lambda option: option[0])
        queue_s = self.perf.queue_s(info.role, load[Column.QUEUED], info.worker_id)
        window_s = work_s
        if config.overlap_half_s:
            window_s += (whole - work_s) * queue_s / (queue_s + config.overlap_half_s)
        prefill = queue_s + window_s + config.work_weight * (work_s - move_s)
        batch, output = (
            load[Column.SEQUENCES],
            min(request.max_tokens, config.expected_output_tokens),
        )
        speed = self.perf.decode_speed(info.role, info.worker_id)
        growth = speed.sequence_s + speed.kv_token_s * (num_tokens + output / 2)
        itl_s = speed.fixed_s + speed.sequence_s * batch
        itl_s += speed.kv_token_s * load[Column.RESIDENT] + growth
        decode = output * (itl_s + config.slowdown_weight * batch * growth) + queue_s
        on_device = self.lengths(row)[0] * block_size
        missing = max(0.0, num_tokens + output - on_device - load[Column.AVAILABLE])
        token_s = self.perf.prefill_speed(info.role, info.worker_id).token_s
        decode += missing * token_s * config.shortage_factor
        over = max(0, batch + 1 - info.max_num_seqs)
        decode += over * output * itl_s / info.max_num_seqs
        local = math.inf
        if (
            config.local_prefill_max_tokens > 0
            and num_tokens - cached <= config.local_prefill_max_tokens
            and load[Column.QUEUED] <= config.local_prefill_max_queued_tokens
            and not missing
        ):
            local = prefill + decode + config.slowdown_weight * batch * (work_s - move_s)
        return Cost(
            cached,
            queue_s,
            move_s,
            work_s - move_s,
            window_s,
            prefill,
            decode,
            itl_s,
            missing,
            local,
        )

    def handoff(self, prefill: WorkerRow, decode: WorkerRow) -> float:
        config, layout = self.config, prefill.info.layout
        num_tokens = self.request.num_prompt_tokens
        per_byte, latency = self.link(decode, prefill)
        on_device = self.lengths(decode)[0] * layout.block_size
        tail_s = min(num_tokens, config.handoff_tail_tokens) * layout.token_bytes * per_byte
        move_s = (num_tokens - on_device) * layout.token_bytes * per_byte
        return config.handoff_s + latency + max(move_s - self.cost(prefill).window_s, tail_s)

    def best(self) -> float:
        """The lowest score of any pair or any decode worker alone, where both pools answer."""
        candidates = [row for row in self.rows if row.is_eligible]
        prefills = [row for row in candidates if row.info.role is Role.PREFILL]
        decodes = [row for row in candidates if row.info.role is Role.DECODE]
        pairs = [
            self.cost(p).prefill + self.cost(d).decode + self.handoff(p, d)
            for p, d in product(prefills, decodes)
        ]
        return min(pairs + [self.cost(d).local for d in decodes])
