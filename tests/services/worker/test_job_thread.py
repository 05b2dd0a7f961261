import threading

import pytest

from baton.core.errors import Unavailable
from services.worker.job_thread import JobThread


@pytest.fixture
def start():
    threads = []

    def start(work=None):
        thread = JobThread("test", work=work)
        thread.start()
        threads.append(thread)
        return thread

    yield start
    for thread in threads:
        thread.stop()
        assert thread.join(5.0)
        assert not thread.is_alive


def test_jobs_run_in_order_and_answer(start):
    thread = start()
    done = []
    futures = [thread.submit(lambda n=n: done.append(n) or n) for n in range(20)]
    assert [future.result(5) for future in futures] == list(range(20))
    assert done == list(range(20))


def test_job_that_raises_harms_nobody(start):
    thread = start()
    failed = thread.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(5)
    assert thread.submit(lambda: 1).result(5) == 1


def test_cancelled_job_does_not_run(start):
    thread = start()
    gate = threading.Event()
    thread.submit(gate.wait)
    ran = []
    cancelled = thread.submit(lambda: ran.append(1))
    assert cancelled.cancel()
    gate.set()
    thread.submit(lambda: None).result(5)
    assert not ran


def test_work_runs_until_there_is_none_and_after_a_wake(start):
    left = [3]
    has_slept = threading.Semaphore(0)

    def work():
        if left[0] == 0:
            has_slept.release()
            return None
        left[0] -= 1
        return 0.0

    thread = start(work)
    assert has_slept.acquire(timeout=5)
    left[0] = 2
    assert not has_slept.acquire(timeout=0.05), "asleep"
    thread.wake()
    assert has_slept.acquire(timeout=5)
    assert left[0] == 0
    left[0] = 1
    thread.submit(lambda: None)
    assert has_slept.acquire(timeout=5), "a job may have made work"


def test_jobs_come_before_work(start):
    order = []
    gate = threading.Event()

    def work():
        gate.wait(5)
        order.append("work")
        return 0.0 if len(order) < 6 else None

    thread = start(work)
    jobs = [thread.submit(lambda: order.append("job")) for _ in range(3)]
    gate.set()
    for job in jobs:
        job.result(5)
    assert order[1:4] == ["job"] * 3 or order[:3] == ["job"] * 3


def test_work_that_raises_is_tried_again_later(start, caplog):
    calls = threading.Semaphore(0)

    def work():
        calls.release()
        raise RuntimeError("defect")

    thread = start(work)
    assert calls.acquire(timeout=5)
    assert thread.submit(lambda: 1).result(5) == 1
    assert "low-priority work failed" in caplog.text


def test_queued_jobs_run_before_the_end(start):
    thread = start()
    futures = [thread.submit(lambda n=n: n) for n in range(5)]
    thread.stop()
    assert thread.join(5.0)
    assert [future.result(0) for future in futures] == list(range(5))
    with pytest.raises(Unavailable):
        thread.submit(lambda: 1)


def test_hanging_job_is_left_behind(caplog):
    thread = JobThread("test")
    thread.start()
    gate = threading.Event()
    thread.submit(gate.wait)
    thread.stop()
    assert not thread.join(0.05)
    assert "did not end within 0.05 s" in caplog.text
    gate.set()
    assert thread.join(5.0)
