"""Runs Python that a model wrote, in a box: `run` a program, `evaluate` expressions after it, `run_many` of both.

    run("print(6 * 7)").stdout                          -> "42\\n"
    evaluate("def f(x): return x * 2", ["f(21)"]).values -> [42]

Each call starts a fresh interpreter in a box that is closed before the first line of the model's code and gone, with every process
that it started, when the call returns.

    namespaces  own user, mount, pid, net, ipc, uts and cgroup namespaces; root is a private tmpfs with /usr and the interpreter read-only;
                no /proc, no /etc, no network, no device but null, zero, urandom; no capability, uid 65534; a system call filter
    landlock    where user namespaces are refused: the same files by allow-list, the same filter and limits. Weaker, see `choose`
    none        time, memory and size limits only, and only after --sandbox=none_i_accept

It stops accidents, abuse of resources, reading of files and secrets, use of the network, and escapes that need a refused system call.
It shares the host's kernel: a kernel bug behind an allowed call, or a CPU side channel, defeats it. Do not run hostile code on a machine
that holds secrets; use a virtual machine. Memory is limited per process by the kernel, and for all of a box's processes together by a look
every 0.1 s (a page that forked processes share counts for each): many of them can take more for that long. arm64 has its own call table,
but nobody has run it there.

What a value means: it was computed in the process that also ran the model's code, and code that goes looking for the channel can write
to it whatever it likes. It cannot make the parent run anything, and what it would have to forge, the expected value, never enters the box.
Printing, exiting early in any way, or garbage on any descriptor produces no value.
"""
import marshal
import os
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

MAX_CODE, MAX_STDIN, MAX_OUTPUT = 256 << 10, 1 << 20, 64 << 10      # bytes; output is stdout and stderr together
MAX_VALUE, MAX_VALUES = 1 << 20, 8 << 20                            # bytes of one value and of all values of a call
MAX_FILE, MAX_DISK = 32 << 20, 64 << 20                             # one file, and (namespaces) the whole working folder
MAX_REPORT = 64 << 20                                               # the keeper sends back at most a quarter of it
MAX_EQUAL_HASHES = 16                                               # keys of one hash in a set or dict: more is an attack on the parent
START_SECONDS = 60                                                  # for a box to start on a machine that is overloaded
SAMPLE_SECONDS = 0.1
NAMES = ("auto", "namespaces", "landlock", "none_i_accept")

_python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
_chosen, _choosing, _lock = None, threading.Lock(), threading.Lock()


class SandboxUnavailable(RuntimeError):
    """A box did not start. Says nothing about the model's code: a grader turns it into grader_error."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What stands in the place of a value that did not come back."""
    kind: str       # exception | unsupported (type) | too_large | not_reached
    text: str = ""


@dataclass(slots=True)
class Result:
    status: str                                 # ok | error | timeout | memory | output_limit
    stdout: str = ""                            # bad UTF-8 replaced, cut at MAX_OUTPUT
    stderr: str = ""
    values: list = field(default_factory=list)  # one for each expression; a Failure where there is none
    files: dict = field(default_factory=dict)   # name -> bytes: regular files of the working folder, at most 256 and 16 MB
    seconds: float = 0.0                        # wall time of the code, without the start of the box
    files_left_out: int = 0                     # links, special files, names that are not UTF-8, and all beyond the limits


# -----------------------------------------------------------------------------
# The lines around the model's code. This text is the whole program of the interpreter that is started for a call; everything after
# box.start() runs in the closed box.

_INSIDE = """
import sys
sys.path.insert(0, sys.argv[1])
import sandbox_child as box
del sys.path[0]

def inside(job, os=box.os, box=box, compile=compile, exec=exec, eval=eval, type=type, isinstance=isinstance, str=str, len=len):
    pid = os.getpid()

    def send(*message):
        if os.getpid() == pid:                      # a child that the code forked has nothing to say
            data = box.encode(message, 2 * job["max_value"])
            box.write_all(job["values_fd"], job["key"] + box.struct.pack("<I", len(data)) + data)

    def describe(e):
        try:
            return (type(e).__name__ + ": " + str(e))[:500]
        except BaseException:
            return type(e).__name__

    def execute(source, name):
        try:
            exec(compile(source, name, "exec"), space)
        except SystemExit as e:
            if expressions is None:
                raise
            send("end", "error", describe(e))
            os._exit(1)
        except BaseException as e:
            send("end", "memory" if isinstance(e, MemoryError) else "error", "")
            try:
                e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next       # not this frame
                sys.excepthook(type(e), e, e.__traceback__)
            finally:
                if expressions is None:
                    sys.exit(1)
                os._exit(1)

    expressions = job["expressions"]
    module = type(sys)("__main__" if expressions is None else "solution")
    sys.modules[module.__name__], space = module, module.__dict__
    space["__builtins__"] = box.sys.modules["builtins"]
    execute(job["code"], "<code>")
    if expressions is None:
        return
    if job["after"]:
        execute(job["after"], "<after>")
    for i in range(len(expressions)):
        try:
            value = eval(compile(expressions[i].strip(), "<expression>", "eval"), space)
        except BaseException as e:
            message = i, "exception", describe(e)
        else:
            try:
                message = i, "value", box.encode(value, job["max_value"])
            except (box.TooLarge, MemoryError) as e:
                message = i, "too_large", ""
            except BaseException as e:
                message = i, "unsupported", describe(e)
            value = None
        send(*message)
    send("end", "ok", "")
    os._exit(0)

job = box.start()
sys.modules["builtins"].exit = sys.modules["builtins"].quit = sys.exit
sys.dont_write_bytecode = True
sys.argv[:] = [""]
sys.path.insert(0, job["folder"])
del sys.modules["sandbox_child"], box
inside(job)
"""


# -----------------------------------------------------------------------------
# Values: `sandbox_child.encode` backwards

class Malformed(ValueError):
    pass


def decode(data: bytes):
    """The value that `data` spells. Executes nothing, reads no further than `data`; raises Malformed, also for sets and dicts whose keys
    were chosen to make hashing quadratic. Work and memory are linear in len(data)."""
    position = 0

    def take(size):
        nonlocal position
        if size > len(data) - position:
            raise Malformed("truncated")
        position += size
        return data[position - size:position]

    def hashable(items):
        count = {}
        for item in items:
            h = hash(item)
            count[h] = count.get(h, 0) + 1
            if count[h] > MAX_EQUAL_HASHES:
                raise Malformed("too many keys of one hash")
        return items

    def get(depth):
        tag = take(1)
        if depth > 64 + 2:
            raise Malformed("too deep")
        if tag in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[tag]
        if tag == b"f":
            return struct.unpack("<d", take(8))[0]
        if tag == b"c":
            return complex(*struct.unpack("<dd", take(16)))
        size = int.from_bytes(take(4), "little")
        if tag in b"isb":
            raw = take(size)
            if tag == b"i":
                if size > 14_000 // 8 + 1:
                    raise Malformed("an integer that Python does not print")
                return int.from_bytes(raw, "little", signed=True)
            return raw if tag == b"b" else raw.decode("utf-8", "surrogatepass")
        if tag not in b"ltSZd" or size > len(data) - position:
            raise Malformed("unknown type or length")
        items = [get(depth + 1) for _ in range(size)]
        if tag == b"d":
            if size % 2:
                raise Malformed("a key without a value")
            return dict(zip(hashable(items[::2]), items[1::2]))
        return items if tag == b"l" else tuple(items) if tag == b"t" else (set if tag == b"S" else frozenset)(hashable(items))

    try:
        value = get(0)
    except (TypeError, UnicodeDecodeError) as e:        # an unhashable key, bad text
        raise Malformed(str(e)) from None
    if position != len(data):
        raise Malformed("trailing bytes")
    return value


def _messages(data, key):
    """Frames of key, length, payload -> tuples. Ends at the first byte that does not fit, for what follows has no author."""
    position, head = 0, len(key) + 4
    while data[position:position + len(key)] == key and len(data) >= position + head:
        size = int.from_bytes(data[position + len(key):position + head], "little")
        payload = data[position + head:position + head + size]
        try:
            message = decode(payload) if len(payload) == size else None
        except Malformed:
            return
        if not (isinstance(message, tuple) and len(message) == 3 and isinstance(message[1], str)):
            return
        yield message
        position += head + size


def _read_values(data, key, num):
    """-> (values, status of the code or None if its end was not reached)."""
    values, end = [], None
    for who, kind, content in _messages(data, key):
        if who == "end":
            end = kind
            break
        if who != len(values) or len(values) >= num:
            break
        if kind == "value" and isinstance(content, bytes):
            try:
                values.append(decode(content))
            except Malformed as e:
                values.append(Failure("unsupported", str(e)))
        else:
            values.append(Failure(kind if kind in ("exception", "unsupported", "too_large") else "unsupported", str(content)[:500]))
    return values + [Failure("not_reached")] * (num - len(values)), end


# -----------------------------------------------------------------------------
# One call

def run(code, *, stdin="", timeout=5.0, memory_mb=512, files=None) -> Result:
    """Runs `code` as a program: `__name__` is "__main__", stdin is text, the working folder holds `files` (relative name -> bytes) and
    is its only place to write. `timeout`: wall seconds of everything in the box; a process has four fifths of it in CPU time. Status
    ok: it ended with exit status 0. Raises SandboxUnavailable if the box did not start."""
    return _call(dict(code=code, after="", expressions=None, stdin=stdin), timeout, memory_mb, files or {})


def evaluate(code, expressions, *, after="", timeout=5.0, memory_mb=512) -> Result:
    """Executes `code` as a module named "solution" (so nothing under `if __name__ == "__main__"`), then `after` in it, then each
    expression, and ends without exit handlers. Result.values[i] is expression i's value, rebuilt here out of None, bool, int (up to
    14,000 bits), float, complex, str, bytes, list, tuple, set, frozenset, dict (subclasses as these), or a Failure. Status ok: every
    expression was reached, whatever became of it; error: the code raised or ended the process."""
    return _call(dict(code=code, after=after, expressions=list(expressions), stdin=""), timeout, memory_mb, {})


def run_many(jobs, num_workers=None) -> list:
    """jobs: dicts of keyword arguments of `evaluate` (those with "expressions") or `run` -> list[Result] in their order. At most
    `num_workers` boxes at a time; by default the cores that no rank of this machine needs. SandboxUnavailable if one did not start."""
    if num_workers is None:
        num_workers = max(1, len(os.sched_getaffinity(0)) - int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(lambda job: (evaluate if "expressions" in job else run)(**job), jobs))


def _call(job, timeout, memory_mb, files, use=None):
    size = max(len(job["code"].encode("utf-8", "surrogatepass")), len(job["after"].encode("utf-8", "surrogatepass")))
    num = len(job["expressions"] or ())
    if size > MAX_CODE:
        return Result("error", stderr=f"source too long: expected at most {MAX_CODE} bytes, found {size}",
                      values=[Failure("not_reached")] * num)
    stdin = job["stdin"].encode("utf-8", "replace")
    if len(stdin) > MAX_STDIN:
        raise ValueError(f"stdin: expected at most {MAX_STDIN} bytes, found {len(stdin)}")
    for name in files:
        if not name or any(part in ("", ".", "..") or "\0" in part for part in name.split("/")):
            raise ValueError(f"files: expected names relative to the working folder, found {name!r}")
    if sum(map(len, files.values())) > MAX_DISK // 2 or len(files) > 1024:
        raise ValueError(f"files: expected at most 1024 with {MAX_DISK // 2} bytes")
    use = use or _use()
    key = secrets.token_bytes(16)
    folder = tempfile.mkdtemp(prefix="box-") if use != "namespaces" else ""
    try:
        job = job | dict(tier=use, key=key, stdin=stdin, files=files, folder=folder, timeout=float(timeout), memory_bytes=memory_mb << 20,
                         cpu_seconds=max(1, round(0.8 * timeout)), file_bytes=MAX_FILE, disk_bytes=MAX_DISK, max_value=MAX_VALUE)
        pipes, stopped = _drive(job, folder)
    finally:
        if folder:
            _remove(folder)
    report = pipes["report"]
    try:
        report = decode(report)
    except Malformed:
        raise SandboxUnavailable(f"{use}: the box ended without a report; {pipes['stderr'][-500:].decode('utf-8', 'replace')}") from None
    if report[0] == "unavailable":
        raise SandboxUnavailable(f"{use}: {report[1]}")
    _, status, timed_out, seconds, cpu, found, left_out = report
    values, end = _read_values(pipes["values"], key, num)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
    if stopped:
        name = stopped
    elif timed_out or killed in (signal.SIGKILL, signal.SIGXCPU) and cpu > job["cpu_seconds"] - 0.2:
        name = "timeout"
    elif end == "memory" or killed == signal.SIGKILL:           # nobody else kills: the kernel was out of memory
        name = "memory"
    else:
        name = "ok" if status == 0 and (job["expressions"] is None or end == "ok") else "error"
    stdout, stderr = (pipes[p].decode("utf-8", "replace") for p in ("stdout", "stderr"))
    return Result(name, stdout, stderr, values, found, seconds, left_out)


def _drive(job, folder):
    """Starts the keeper, feeds it, reads what comes, ends with it -> ({name: bytes}, why we stopped it or None)."""
    (values, values_in), (report, report_in) = os.pipe(), os.pipe()
    try:
        env = dict(PATH="/usr/bin:/bin", HOME=folder or "/tmp", TMPDIR=folder or "/tmp", LANG="C.UTF-8", OMP_NUM_THREADS="1",
                   OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="0")
        # not -I, which would ignore PYTHONHASHSEED: the environment is ours to the last variable
        command = [_python, "-s", "-S", "-P", "-u", "-X", "utf8", "-c", _INSIDE, str(Path(__file__).resolve().parent)]
        keeper = subprocess.Popen(command, env=env, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  pass_fds=(values_in, report_in), start_new_session=True, bufsize=0)
    except OSError as e:
        os.close(values), os.close(report)
        raise SandboxUnavailable(f"{_python} did not start: {e}") from None
    finally:
        os.close(values_in), os.close(report_in)
    source = marshal.dumps(job | dict(values_fd=values_in, report_fd=report_in))
    source = memoryview(struct.pack("<Q", len(source)) + source)
    pipes = dict(stdout=bytearray(), stderr=bytearray(), values=bytearray(), report=bytearray())
    limits = dict(values=MAX_VALUES, report=MAX_REPORT)
    stopped, begin, next_sample = None, time.monotonic(), time.monotonic() + SAMPLE_SECONDS
    selector = selectors.DefaultSelector()
    try:
        for name, fd in dict(stdout=keeper.stdout.fileno(), stderr=keeper.stderr.fileno(), values=values, report=report).items():
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ, name)
        os.set_blocking(keeper.stdin.fileno(), False)
        selector.register(keeper.stdin.fileno(), selectors.EVENT_WRITE, "job")
        open_report = True
        while open_report:
            for ready, _ in selector.select(SAMPLE_SECONDS):
                if ready.data == "job":
                    try:
                        source = source[os.write(ready.fd, source):]
                    except BrokenPipeError:
                        source = source[:0]
                    if not source:
                        selector.unregister(ready.fd)           # stays open: closing it tells the keeper to stop
                    continue
                more = _take(ready.fd, pipes, ready.data, limits)
                if more is False:
                    selector.unregister(ready.fd)
                    open_report = open_report and ready.data != "report"
                elif more is None and not stopped:
                    stopped = "output_limit"
                    keeper.stdin.close()
            now = time.monotonic()
            if now > begin + START_SECONDS + job["timeout"]:
                raise SandboxUnavailable(f"the box's keeper did not answer for {now - begin:.0f} s")
            if now > next_sample and not stopped:
                used, cost = _memory_of(keeper.pid)
                next_sample = now + max(SAMPLE_SECONDS, 20 * cost)
                if used > job["memory_bytes"]:
                    stopped = "memory"
                    keeper.stdin.close()
        for name, fd in dict(stdout=keeper.stdout.fileno(), stderr=keeper.stderr.fileno(), values=values).items():
            while (more := _take(fd, pipes, name, limits)):     # all writers are dead: what is left is in the pipe
                pass
            if more is None and not stopped:
                stopped = "output_limit"
        return {name: bytes(data) for name, data in pipes.items()}, stopped
    finally:
        selector.close()
        keeper.stdin.close()
        try:
            keeper.wait(10)                                     # it has reported, or now kills the box because stdin closed
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
        keeper.stdout.close(), keeper.stderr.close()
        os.close(values), os.close(report)


def _take(fd, pipes, name, limits):
    """Reads once -> True: go on; False: the end, or nothing there; None: over the limit, the rest is thrown away."""
    try:
        data = os.read(fd, 65536)
    except BlockingIOError:
        return False
    if name in limits:
        room = limits[name] - len(pipes[name])
    else:
        room = MAX_OUTPUT - len(pipes["stdout"]) - len(pipes["stderr"])
    pipes[name] += data[:room]
    return None if len(data) > room else bool(data)


_table, _table_time, _table_cost = {}, 0.0, 0.0


def _memory_of(pid):
    """-> (bytes of the descendants of `pid` that no file backs, seconds that a look at all processes takes). One look serves all boxes."""
    global _table, _table_time, _table_cost
    with _lock:
        begin = time.monotonic()
        if begin > _table_time + SAMPLE_SECONDS / 2:
            table = {}
            for name in os.listdir("/proc"):
                if name.isdigit():
                    try:
                        with open(f"/proc/{name}/stat", "rb") as f:
                            table.setdefault(int(f.read().rpartition(b")")[2].split()[1]), []).append(int(name))
                    except OSError:
                        pass
            _table, _table_time = table, time.monotonic()
            _table_cost = _table_time - begin
        table, cost = _table, _table_cost
    used, new = 0, [pid]
    while new:
        new = [child for parent in new for child in table.get(parent, ())]
        for child in new:
            try:
                with open(f"/proc/{child}/statm", "rb") as f:
                    _, resident, shared, *_ = map(int, f.read().split())
                used += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, ValueError):
                pass
    return used, cost


def _remove(folder):
    """Removes a folder that hostile code filled: any depth without recursion (what lies deeper is moved up), any mode, no link followed."""
    os.chmod(folder, 0o700)
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)                 # its parent changes, which writes to it
                    os.rename(inner.path, os.path.join(folder, secrets.token_hex(16)))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
    shutil.rmtree(folder)


# -----------------------------------------------------------------------------
# Which tier

_PROBE = """
import os, socket
def refused(f, *a):
    try:
        f(*a)
    except OSError:
        return True
    return False
libc = __import__("ctypes").CDLL(None, use_errno=True)
status = lambda: [refused(open, p) for p in ("/etc/passwd", "/proc/1/environ", "/proc/self/environ", SECRET)]
"""
_CHECKS = {
    "status()": [True] * 4,
    "refused(open, '/usr/box', 'w')": True,
    "refused(socket.socket)": True,
    "libc.unshare(0x10000000)": -1,
    "libc.ptrace(0, 0, 0, 0)": -1,
    "open('x', 'w').write('1')": 1,
    "os.getuid() == 0": False,
}
_WEAKER = ("the process table is shared", "names and sizes of files can be seen", "disk is limited per file only")


def _self_test(name):
    """-> None, or why the tier does not work here."""
    if sys.platform != "linux":
        return "needs Linux"
    fd, secret = tempfile.mkstemp(prefix="box-")
    os.close(fd)
    try:
        result = _call(dict(code=f"SECRET = {secret!r}\n{_PROBE}", after="", expressions=list(_CHECKS), stdin=""), 20.0, 512, {}, name)
    except SandboxUnavailable as e:
        return str(e).removeprefix(f"{name}: ")
    finally:
        os.unlink(secret)
    for (expression, expected), value in zip(_CHECKS.items(), result.values):
        if value != expected:
            return f"self-test: {expression} should be {expected}, is {value} ({result.status} {result.stderr[-200:]})"
    return None


def choose(name="auto") -> str:
    """--sandbox: picks the tier for this process once, by self-test, prints one line that says what it lacks, and returns the tier's name.
    Raises SandboxUnavailable if what was asked for does not work; nothing weaker is taken instead."""
    global _chosen
    if name not in NAMES:
        raise ValueError(f"--sandbox: expected one of {', '.join(NAMES)}, found {name!r}")
    failures = []
    for candidate in ("namespaces", "landlock") if name == "auto" else (name.removesuffix("_i_accept"),):
        why = None if candidate == "none" and sys.platform == "linux" else _self_test(candidate)
        if why is None:
            _chosen = candidate
            weaker = ""
            if candidate == "landlock":
                weaker = "; weaker than namespaces: " + ", ".join(_WEAKER)
                weaker += ", a fork bomb takes processes from the trainer's user" * (os.getuid() != 0)
            elif candidate == "none":
                weaker = "; nothing but time, memory and size is limited: the code can read, write and send what this user can"
            print(f"sandbox: {candidate}{weaker}" + (f" ({'; '.join(failures)})" if failures else ""), flush=True)
            return candidate
        failures.append(f"{candidate}: {why}")
    raise SandboxUnavailable(f"--sandbox={name} does not work here: {'; '.join(failures)}. Allow user namespaces "
                             "(sysctl kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces), or accept the risk with "
                             "--sandbox=none_i_accept")


def _use():
    """The tier of this process; `auto` if nobody chose. One thread chooses, the others wait for it."""
    with _choosing:
        if _chosen is None:
            choose("auto")
    return _chosen


def tier() -> str:
    """namespaces | landlock | none: what `run` uses. "none" also where no box works: `run` raises SandboxUnavailable, code tasks skip."""
    try:
        return _use()
    except SandboxUnavailable:
        return "none"
