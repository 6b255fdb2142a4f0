"""Hostile code against the box: every attack runs in each tier that works here, as the current user and, for root, also as another user.

The list of attacks is ATTACKS; a driver process runs all of them for one tier and user, beside a victim process, a secret file and
listening sockets of the same user, and afterwards looks at what was left or changed. What a tier cannot give is skipped with its reason.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from data import sandbox, sandbox_child
from data.sandbox import Failure, Malformed, decode, evaluate, run, run_many
from data.sandbox_child import TooLarge, encode

if sys.platform != "linux":
    pytest.skip("the sandbox needs Linux", allow_module_level=True)

SOURCES = [Path(sandbox.__file__), Path(sandbox_child.__file__)]
LOW_UID = 54321 + os.getpid() % 1000                 # one for each test process: the kernel counts a user's processes

# -----------------------------------------------------------------------------
# Attacks: code that prints "blocked" once for each attempt that failed and "through" for one that did not

PRELUDE = """
import ctypes, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(f, *args):
    try:
        print("through", f(*args))
    except Exception:
        print("blocked")
def call(name, *args):
    r = libc.syscall(*(a if isinstance(a, bytes) else ctypes.c_long(a) for a in (NUMBERS[name], *args)))
    print("blocked" if r < 0 else f"through {name} {r}")
"""


def all_blocked(r):
    words = r["stdout"].split()
    return r["status"] == "ok" and len(words) > 0 and set(words) == {"blocked"}


def dies(r):
    return r["status"] == "error" and "through" not in r["stdout"]


def no_value(r):
    return r["values"] == ["Failure not_reached"] and r["status"] in ("error", "timeout")


def values(*expected):
    return lambda r: r["values"] == [repr(v) if not isinstance(v, Failure) else f"Failure {v.kind}" for v in expected]


def status(*names):
    return lambda r: r["status"] in names


ATTACKS = {}        # name -> (keyword arguments of run or evaluate, what must hold for the result, tiers)


def attack(name, code, holds=all_blocked, tiers=("namespaces", "landlock"), timeout=20.0, **job):
    ATTACKS[name] = (dict(code=code, timeout=timeout, **job), holds, tiers)


# reading
attack("a file of the same user", "attempt(open, SECRET)")
attack("a path that climbs", "for p in (SECRET[1:], 'etc/passwd', 'proc/self/status'): attempt(open, '../' * 30 + p); attempt(open, '/../' + p)")
attack("/etc/passwd", "attempt(open, '/etc/passwd'); attempt(open, '/etc/shadow')")
attack("environ, memory and descriptors of the trainer", "for n in ('environ', 'mem', 'maps', 'fd/0', 'cmdline'): attempt(open, f'/proc/{TRAINER}/{n}', 'rb')")
attack("/proc", "attempt(open, '/proc/self/environ'); attempt(os.listdir, '/proc'); attempt(os.readlink, f'/proc/{VICTIM}/cwd')")
attack("own environment", "print(sorted(os.environ))", lambda r: "TOKEN" not in r["stdout"] and r["status"] == "ok")
attack("inherited descriptors", """
import stat
for fd in range(3, 4096):
    try:
        print(stat.S_ISFIFO(os.fstat(fd).st_mode), os.get_inheritable(fd))
    except OSError:
        pass
""", lambda r: r["stdout"] == "True False\n")
attack("hard link to the secret", "attempt(os.link, SECRET, 'here')")
attack("devices", "print(*sorted(os.listdir('/dev')))", lambda r: r["stdout"] == "null urandom zero\n", ("namespaces",))
attack("other devices", "for d in ('/dev/kmsg', '/dev/mem', '/dev/tty', '/dev/nvidia0', '/dev/shm/x', '/dev/vda'): attempt(open, d, 'wb')")
attack("new device", "attempt(os.mknod, 'null', 0o20666, os.makedev(1, 3))")
# writing
attack("write outside", "for p in (FOLDER, '/', '/usr', '/usr/lib', '/dev', '/var/tmp', '/etc', os.path.dirname(os.__file__)): attempt(open, p + '/x', 'w')")
attack("write to the interpreter", "attempt(open, os.__file__, 'a'); attempt(os.truncate, os.__file__, 0); attempt(os.unlink, os.__file__)")
attack("truncate, rename, remove", "attempt(os.truncate, SECRET, 0); attempt(os.rename, SECRET, 'x'); attempt(os.unlink, SECRET); attempt(os.rmdir, FOLDER)")
attack("mode, owner and times", """
attempt(os.chmod, SECRET, 0o777); attempt(os.utime, SECRET, (0, 0)); attempt(os.chown, SECRET, os.getuid(), os.getgid())
attempt(os.setxattr, SECRET, 'user.x', b'1'); attempt(os.chmod, os.__file__, 0); attempt(os.utime, os.__file__, (0, 0))
""")
attack("one large file", "with open('x', 'wb', 0) as f:\n  for i in range(400):\n    if f.write(bytes(1 << 20)) != 1 << 20: raise OSError",
       lambda r: r["status"] == "error" and "through" not in r["stdout"])
attack("400 MB of disk", "for i in range(20):\n  with open(str(i), 'wb', 0) as f:\n    n = 0\n    while n < 20 << 20: n += f.write(bytes(1 << 20))",
       lambda r: r["status"] == "error" and "No space" in r["stderr"], ("namespaces",))
attack("100k files", "for i in range(100_000): os.close(os.open(str(i), os.O_CREAT))", lambda r: "No space" in r["stderr"], ("namespaces",))
attack("links and special files left behind", "os.symlink(SECRET, 'link'); os.mkfifo('fifo'); open('kept', 'w').write('yes'); os.symlink(FOLDER, 'folder')",
       lambda r: r["files"] == {"kept": "yes"} and r["files_left_out"] == 3)
attack("folders 1,100 deep, unreadable ones, odd names", """
os.mkdir('closed'); os.umask(0o777); os.mkdir('none'); os.umask(0o022); open(b'\\xff', 'w').close()
for i in range(1100): os.mkdir('d'); os.chdir('d')
open('deep', 'w').write('x')
""", lambda r: r["status"] == "ok" and "deep" not in str(r["files"]))
# network and communication
attack("TCP to localhost", "attempt(lambda: socket.create_connection(('127.0.0.1', PORT)))")
attack("sockets of any kind", "for f in (1, 2, 10, 16, 17, 38, 40, 44): attempt(socket.socket, f, 2 if f == 38 else 1 if f != 17 else 3); attempt(socket.socketpair)")
attack("abstract socket", "def f():\n  s = socket.socket(socket.AF_UNIX); s.connect('\\0' + ABSTRACT)\nattempt(f)")
attack("System V and POSIX queues", "call('shmget', 0, 4096, 0o1600); call('semget', 0, 1, 0o1600); call('msgget', 0, 0o1600); call('mq_open', b'x', 0o102, 0o600, 0)")
# processes
attack("signals", """
for pid in (TRAINER, VICTIM):
    attempt(os.kill, pid, 9); attempt(os.kill, pid, 0)
    attempt(lambda: libc.syscall(NUMBERS['tgkill'], pid, pid, 9) and 1 / 0)
    attempt(lambda: __import__('signal').pidfd_send_signal(os.pidfd_open(pid), 9))
""")
attack("kill(-1)", "try: os.kill(-1, 9)\nexcept OSError: pass\nprint('blocked')")
attack("limits, priority and cores of the victim", """
call('prlimit64', VICTIM, 9, 0, 0); attempt(os.sched_setaffinity, VICTIM, {0}); attempt(os.setpriority, os.PRIO_USER, os.getuid(), 19)
attempt(os.setpriority, os.PRIO_PROCESS, VICTIM, 19); call('ioprio_set', 1, VICTIM, 0)
attempt(os.sched_setscheduler, VICTIM, os.SCHED_IDLE, os.sched_param(0))
attempt(lambda: __import__('fcntl').fcntl(1, 8, VICTIM))
""")
attack("ptrace and memory of others", """
call('ptrace', 16, VICTIM, 0, 0); call('ptrace', 0, 0, 0, 0); call('process_vm_readv', TRAINER, 0, 0, 0, 0, 0)
call('process_vm_writev', TRAINER, 0, 0, 0, 0, 0); call('kcmp', TRAINER, VICTIM, 0, 0, 0); call('pidfd_getfd', 0, 0, 0)
""")
attack("1,000 processes", """
try:
    for i in range(1000):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    print("through")
except OSError:
    print("blocked")
""", lambda r: all_blocked(r) or r["status"] == "memory")         # copies of a page count for each process
attack("fork bomb", "while True:\n  try: os.fork()\n  except OSError: pass", status("timeout", "memory"), timeout=0.3)
attack("1,000 threads", "import threading\ndef f():\n  for i in range(1000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nattempt(f)")
attack("a shell", "print(os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', f'cat {SECRET} /etc/passwd; echo x > {FOLDER}/x; echo harmless'], {}), 0)[1])",
       lambda r: r["stdout"] == "harmless\n0\n")
attack("grandchild in its own session holds the pipe", "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)\nprint('parent')",
       lambda r: r["status"] == "ok" and r["stdout"] == "parent\n" and r["seconds"] < 3)
attack("sleep with signals ignored", "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\ntime.sleep(60)",
       status("timeout"), timeout=0.5)
attack("outliving the trainer", "call('prctl', 1, 0, 0, 0, 0); call('prctl', 4, 1, 0, 0, 0); call('prctl', 22, 0, 0, 0, 0)")
# the kernel
attack("nested namespaces", "call('unshare', 0x10000000); call('clone', 0x10000011, 0, 0, 0, 0); call('clone', 0x20000011, 0, 0, 0, 0); call('setns', 0, 0)")
attack("clone3 does not exist", "print(libc.syscall(NUMBERS['clone3'], 0, 0), ctypes.get_errno())", lambda r: r["stdout"] == "-1 38\n")
attack("newer calls do not exist", "print(libc.syscall(467, 0, 0), ctypes.get_errno())", lambda r: r["stdout"] == "-1 38\n")
attack("mounts", """
call('mount', b'none', b'/tmp', b'tmpfs', 0, 0); call('umount2', b'/usr', 2); call('pivot_root', b'.', b'.'); call('chroot', b'.')
call('open_tree', -100, b'/', 1); call('fsopen', b'tmpfs', 0); call('mount_setattr', -100, b'/', 0, b'', 32); call('fspick', -100, b'/', 0)
""")
attack("large surfaces of the kernel", """
call('bpf', 0, 0, 0); call('perf_event_open', 0, 0, -1, -1, 0); call('userfaultfd', 0); call('add_key', b'user', b'x', b'y', 1, -2)
call('keyctl', 0, 0, 0); call('io_uring_setup', 8, bytes(120)); call('io_setup', 8, bytes(8)); call('init_module', 0, 0, 0)
call('kexec_load', 0, 0, 0, 0); call('personality', 0x0400000); call('open_by_handle_at', 0, 0, 0); call('seccomp', 1, 0, 0)
""")
attack("terminal injection", "for n in (0x5412, 0x541C, 0x5423): attempt(lambda: __import__('fcntl').ioctl(0, n, b'x' * 8))\n"
       "libc.ioctl(0, ctypes.c_ulong(0x5412), b'x'); assert ctypes.get_errno() == 1")
attack("becoming root", "attempt(os.setuid, 0); attempt(os.setresuid, 0, 0, 0); attempt(os.setgid, 0); attempt(os.setgroups, [0])")
attack("capabilities", "data = (ctypes.c_uint * 6)()\nlibc.capget((ctypes.c_uint * 2)(0x20080522, 0), data)\nprint(list(data), libc.prctl(39, 0, 0, 0, 0))",
       lambda r: r["stdout"] == "[0, 0, 0, 0, 0, 0] 1\n")
attack("bounding set", "print(*{libc.prctl(23, n, 0, 0, 0) for n in range(41)})", lambda r: r["stdout"] == "0\n", ("namespaces",))
attack("x32 call", "libc.syscall(0x40000000 + 39); print('through')", dies)
attack("32-bit call", """
import mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex('b814000000cd80c3'))       # mov eax, 20 (getpid); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
print('through')
""", dies)
# resources
attack("3 GB of memory", "x = bytearray(3 << 30)", status("memory"))
attack("memory of many processes", "for i in range(20):\n  if os.fork() == 0:\n    x = b'x' * (100 << 20); time.sleep(60)\ntime.sleep(60)", status("memory"), memory_mb=256)
attack("flood of stdout", "while True: os.write(1, b'x' * 65536)", lambda r: r["status"] == "output_limit" and len(r["stdout"]) == 65536)
attack("flood of stderr by a child", "if os.fork() == 0:\n  while True: os.write(2, b'x' * 1000)\ntime.sleep(60)",
       lambda r: r["status"] == "output_limit" and len(r["stderr"]) == 65536)
attack("deep recursion", "def f(): f()\nf()", lambda r: r["status"] == "error" and "RecursionError" in r["stderr"])
attack("recursion without a limit", "sys.setrecursionlimit(10**9)\ndef f(x): return [f(x), *map(f, [x])]\nf(1)", status("error", "memory", "timeout"), timeout=0.5)
attack("endless generator", "x = list(iter(int, 1))", status("memory", "timeout"), timeout=0.5)
attack("CPU time", "while True: pass", lambda r: r["status"] == "timeout" and r["seconds"] < 3.0, timeout=0.5)
# text
attack("NUL and bad UTF-8 on stdout", "os.write(1, b'\\xff\\x00a')", lambda r: r["stdout"] == "\ufffd\0a")
attack("NUL in the source", "print(1)\0", status("error"))
attack("lone surrogate in the source", "print('\ud800')", status("error"))
attack("too much source", "#" * (256 << 10), lambda r: r["status"] == "error" and "262144" in r["stderr"])
# values
FAKE = "import os, struct\nframe = bytes(16) + struct.pack('<I', 20) + b't\\x03\\x00\\x00\\x00'\nfor fd in range(1, 60):\n  try: os.write(fd, frame)\n  except OSError: pass\n"
for name, code in {
    "printed result": "print([42], 'ok', '42'); raise SystemExit(0)",
    "os._exit(0)": "import os; os._exit(0)",
    "sys.exit()": "import sys; sys.exit()",
    "exit()": "exit()",
    "faked message": FAKE + "os._exit(0)",
    "atexit": "import atexit, os; atexit.register(print, 42); raise SystemExit",
    "atexit that ends well": "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
    "end of the thread": "import _thread; _thread.exit()",
    "exit from another thread": "import os, threading, time; threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
    "killing itself": "import os; os.abort()",
    "exec of true": "import os; os.execv('/bin/true', ['true'])",
    "closed descriptors": "import os; os.closerange(0, 99)",
    "BaseException": "raise BaseException('no')",
}.items():
    attack(f"forged value: {name}", code, no_value, expressions=["6 * 7"], timeout=3.0)
attack("garbage before values", FAKE, values(Failure("not_reached")), expressions=["6 * 7"])
attack("fork that returns twice", "import os; os.fork()", values(1, 2, 3), expressions=["1", "2", "3"])
attack("exit in an expression", "import os", values(1, Failure("exception"), Failure("not_reached"), Failure("not_reached")),
       expressions=["1", "exit()", "os._exit(0)", "4"])
attack("builtins replaced", "import builtins, struct\nfor n in ('len', 'type', 'isinstance', 'issubclass', 'int', 'str', 'list', 'repr', 'next'): setattr(builtins, n, None)",
       values([1, "a", (2.5, {3})]), expressions=["[1, 'a', (2.5, {3})]"])
attack("types that lie", """
class A:
    __class__ = property(lambda self: int)
class B(int):
    __pos__ = __index__ = __int__ = bit_length = to_bytes = lambda self, *a: 99
class C(list):
    __iter__ = __len__ = __getitem__ = lambda self, *a: 1 / 0
class D(str):
    encode = __str__ = lambda self, *a: 'forged'
class E(Exception):
    __str__ = lambda self: 1 / 0
def e(): raise E
""", values(Failure("unsupported"), 7, [1], "x", Failure("exception")), expressions=["A()", "B(7)", "C([1])", "D('x')", "e()"])
attack("results that are too large", "a = []\nfor i in range(10**5): a = [a]\nb = [0]\nfor i in range(30): b = [b] * 9\nc = []\nc.append(c)",
       values(*[Failure("too_large")] * 6), expressions=["a", "b", "c", "1 << 33_000_000", "'x' * (2 << 20)", "[None] * (2 << 20)"])
attack("types without a plain form", "class A: pass", values(*[Failure("unsupported")] * 5),
       expressions=["object()", "A()", "iter(int, 1)", "[lambda: 1]", "bytearray(1)"])
attack("keys of one hash", "", values(Failure("unsupported"), Failure("unsupported"), {2**61 - 1: 0, 2 * (2**61 - 1): 1}),
       expressions=["{i * (2**61 - 1) for i in range(300)}", "{(i * (2**61 - 1),): 1 for i in range(300)}", "{i * (2**61 - 1): i - 1 for i in (1, 2)}"])
attack("more values than fit", "", lambda r: r["status"] == "output_limit" and r["values"][-1] == "Failure not_reached", expressions=["'x' * 1000000"] * 12)
attack("expression without end", "", lambda r: r["values"] == ["1", "Failure not_reached"] and r["status"] == "timeout", expressions=["1", "sum(iter(int, 1))"], timeout=0.5)

if os.uname().machine != "x86_64":
    del ATTACKS["x32 call"], ATTACKS["32-bit call"]

DRIVER = r"""
import glob, json, os, socket, subprocess, sys, tempfile
folder = os.getcwd()
sys.path.insert(0, folder)
import sandbox, sandbox_child
task = json.load(sys.stdin)
secret = os.path.join(folder, "secret")
with open(secret, "w") as f:
    f.write("TOKEN")
os.chmod(secret, 0o600)
os.environ["TOKEN"] = "TOKEN"
def state():
    info = os.stat(secret)
    return [open(secret).read(), info.st_mode, info.st_mtime_ns, info.st_ctime_ns, info.st_nlink,
            sorted(set(os.listdir(folder)) - {"__pycache__"}), sorted(glob.glob(tempfile.gettempdir() + "/box-*")), open("/proc/self/mounts").read(),
            sorted(os.listdir("/proc/self/fd")), open("/proc/self/limits").read(), os.getpriority(0, 0)]
victim = subprocess.Popen(["sleep", "600"])
tcp, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
name = f"box-test-{os.getpid()}"
abstract.bind("\0" + name)
abstract.listen()
for s in (tcp, abstract):
    s.settimeout(0.0)
def processes():                                    # those of a box have the command line of its keeper, and with it our folder
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                found += [path] if folder.encode() in f.read().split(b"\0") else []
        except OSError:
            pass
    return found
def of_victim():
    with open(f"/proc/{victim.pid}/limits") as f:
        return [f.read(), sorted(os.sched_getaffinity(victim.pid)), os.getpriority(os.PRIO_PROCESS, victim.pid), os.sched_getscheduler(victim.pid)]
try:
    column = sandbox_child.ARCHITECTURES[os.uname().machine][0]
    known = dict(SECRET=secret, FOLDER=folder, TRAINER=os.getpid(), VICTIM=victim.pid, PORT=tcp.getsockname()[1], ABSTRACT=name,
                 NUMBERS={n: int(row[column]) for n, row in sandbox_child.SYSCALLS.items() if row[column] != "-"})
    prelude = "; ".join(f"{k} = {v!r}" for k, v in known.items()) + task["prelude"]
    try:
        sandbox.choose(task["tier"])
    except sandbox.SandboxUnavailable as e:
        print(json.dumps(str(e)))
        sys.exit()
    sandbox.run("pass")
    before, before_victim = state(), of_victim()
    jobs = [job | (dict(code=prelude + job["code"]) if "expressions" not in job else {}) for job in task["jobs"]]
    # landlock leaves processes and threads to the kernel's count by user, so that a fork bomb leaves none to the jobs beside it
    results = sandbox.run_many(jobs, num_workers=1 if task["tier"] == "landlock" else 3)
    def show(v):
        return f"Failure {v.kind}" if isinstance(v, sandbox.Failure) else repr(v) if len(repr(v)) < 10000 else "long"
    accepted = []
    for s in (tcp, abstract):
        try:
            accepted.append(str(s.accept()))
        except BlockingIOError:
            pass
    for _ in range(20):                             # the trainer forks afterwards
        subprocess.run(["true"], check=True)
    after = dict(changed=[(a, b) for a, b in zip(before, state()) if a != b], victim=victim.poll() is None and of_victim() == before_victim,
                 accepted=accepted, left=processes())
    print(json.dumps(dict(after=after, results=[dict(status=r.status, stdout=r.stdout, stderr=r.stderr, values=[show(v) for v in r.values],
        files={n: d.decode("latin-1") for n, d in r.files.items()}, files_left_out=r.files_left_out, seconds=r.seconds) for r in results])))
finally:
    victim.kill()
    victim.wait()
"""


def who(user):
    return dict(user=LOW_UID, group=LOW_UID, extra_groups=[]) if user == "low" else {}


def pythons(user):
    """Interpreters that `user` can start, ours first."""
    for python in dict.fromkeys((sandbox._python, "/usr/bin/python3", "/usr/local/bin/python3", shutil.which("python3") or "")):
        check = [python, "-c", "import sys, ctypes; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(check, cwd="/", capture_output=True, **who(user)).returncode == 0:
                yield python
        except OSError:
            pass


_ran = {}


def ran(tier, user, tmp_path_factory):
    """All attacks in one tier as one user -> {"after", "results": {name: result}}, or the reason why that cannot be had here."""
    if (tier, user) not in _ran:
        names = [n for n, (_, _, tiers) in ATTACKS.items() if tier in tiers]
        task = json.dumps(dict(tier=tier, prelude=PRELUDE, jobs=[ATTACKS[n][0] for n in names]))
        answer = "no interpreter that this user may start"
        for python in pythons(user):
            folder = Path(subprocess.check_output(["mktemp", "-d"], text=True, **who(user)).strip())
            try:
                for source in SOURCES:
                    shutil.copy(source, folder)
                subprocess.run(["mkdir", folder / "tmp"], check=True, **who(user))                    # boxes of its own to count
                done = subprocess.run([python, "-c", DRIVER], cwd=folder, env=os.environ | {"TMPDIR": str(folder / "tmp")}, input=task, capture_output=True, text=True, timeout=300, **who(user))
                assert done.returncode == 0, done.stderr[-3000:]
                answer = json.loads(done.stdout.splitlines()[-1])
            finally:
                shutil.rmtree(folder)
            if isinstance(answer, dict):
                answer["results"] = dict(zip(names, answer["results"], strict=True))
                break
        _ran[tier, user] = answer
    if isinstance(_ran[tier, user], str):
        pytest.skip(f"{tier}: {_ran[tier, user]}")
    return _ran[tier, user]


USERS = ["self"] + ["low"] * (os.getuid() == 0)
BOXES = [(tier, user) for tier in ("namespaces", "landlock") for user in USERS]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("tier,user", BOXES)
def test_attack(tier, user, name, tmp_path_factory):
    _, holds, tiers = ATTACKS[name]
    if tier not in tiers:
        pytest.skip(f"{tier} cannot limit this, and says so when it is chosen")
    result = ran(tier, user, tmp_path_factory)["results"][name]
    assert holds(result), result


@pytest.mark.parametrize("tier,user", BOXES)
def test_attacks_leave_nothing_and_change_nothing(tier, user, tmp_path_factory):
    after = ran(tier, user, tmp_path_factory)["after"]
    assert after == dict(changed=[], victim=True, accepted=[], left=[])


# -----------------------------------------------------------------------------
# Ordinary use

@pytest.fixture(scope="module")
def box():
    if sandbox.tier() == "none":
        pytest.skip("neither namespaces nor Landlock work here")


def test_run(box):
    r = run("import sys\nname = input()\nprint(f'hi {name}')\nprint('e', file=sys.stderr)", stdin="Ada\n")
    assert (r.status, r.stdout, r.stderr, r.values) == ("ok", "hi Ada\n", "e\n", [])
    r = run("x = 1\nprint(x / 0)")
    assert r.status == "error" and r.stderr == ('Traceback (most recent call last):\n  File "<code>", line 2, in <module>\n'
                                                "ZeroDivisionError: division by zero\n")
    assert [run(f"import sys; sys.exit({x!r})").status for x in (0, None, 3, "no")] == ["ok", "ok", "error", "error"]
    assert run("import atexit, threading\natexit.register(print, 'b')\nthreading.Thread(target=print, args=('a',)).start()").stdout == "a\nb\n"
    assert run("if __name__ == '__main__': print(1)").stdout == "1\n"


def test_the_standard_library_works_and_nothing_else_is_there(box):
    r = run("import asyncio, collections, dataclasses, datetime, decimal, fractions, hashlib, heapq, itertools, json, math, random, re, sqlite3, "
            "statistics, string, tempfile, typing, unittest\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\nprint(P(1))\n"
            "tempfile.NamedTemporaryFile().write(b'x'); print(re.sub('a', 'b', 'a'), hash('x'))\nimport torch")
    assert r.stdout.startswith("P(x=1)\nb ") and r.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")
    assert r.stdout == run("print('P(x=1)')\nprint('b', hash('x'))").stdout        # fixed hash seed


def test_files_live_from_call_to_call(box):
    r = run("import helper, os\nos.makedirs('out/deep')\nopen('out/deep/n', 'wb').write(bytes([helper.n, 255]))\nos.remove('old')",
            files={"helper.py": b"n = 7", "old": b"", "in/x.txt": b"x"})
    assert r.files == {"helper.py": b"n = 7", "in/x.txt": b"x", "out/deep/n": b"\x07\xff"} and r.files_left_out == 0, r
    assert run("print(open('out/deep/n', 'rb').read())", files=r.files).stdout == "b'\\x07\\xff'\n"
    many = run("for i in range(300): open(f'{i:03}', 'w').write('x')")
    assert len(many.files) == 256 and many.files_left_out == 44
    large = run("for i in range(3): open(str(i), 'wb').write(bytes(6 << 20))")
    assert sorted(large.files) == ["0", "1"] and large.files_left_out == 1
    for name in ("../x", "/etc/x", "a//b", "", "a/../../b", "x\0"):
        with pytest.raises(ValueError, match="relative"):
            run("", files={name: b""})
    assert run("open('x', 'w').write('1')\nwhile True: pass", timeout=0.3).files == {"x": b"1"}


VALUES = [None, True, False, 0, -1, 255, -256, 2**70, -2**63, 1.5, -0.0, float("inf"), 1j, "", "a\0ü\ud800", b"\xff", [], [1, [2]], (), (1,), set(), {1, "a"},
          frozenset([frozenset()]), {}, {"a": [1], (1, 2): None}]


def test_evaluate(box):
    r = evaluate("", [repr(v) if v != float("inf") else "float('inf')" for v in VALUES])
    assert r.status == "ok" and r.values == VALUES and [type(v) for v in r.values] == [type(v) for v in VALUES]
    assert str(r.values[VALUES.index(1.5) + 1]) == "-0.0"
    code = "import collections, enum\nclass E(enum.IntEnum): A = 3\nP = collections.namedtuple('P', 'x y')\nnan = float('nan')"
    r = evaluate(code, ["E.A", "P(1, 2)", "collections.Counter('aab')", "collections.OrderedDict(a=1)", "str(nan)", " 1", "x"], after="x = 5")
    assert r.values == [3, (1, 2), {"a": 2, "b": 1}, {"a": 1}, "nan", 1, 5] and [type(v) for v in r.values[:4]] == [int, tuple, dict, dict]
    assert evaluate("x = 0", ["float('nan')"]).values[0] != 0
    r = evaluate("def f(x): return 1 / x", ["f(2)", "f(0)", "f(", "f(1)"])
    assert r.status == "ok" and r.values[::3] == [0.5, 1.0]
    assert r.values[1] == Failure("exception", "ZeroDivisionError: division by zero") and r.values[2].text.startswith("SyntaxError")
    r = evaluate("print('said')\nif __name__ == '__main__': 1 / 0", ["1"], after="1 / 0")
    assert (r.status, r.stdout, r.values) == ("error", "said\n", [Failure("not_reached")]) and "<after>" in r.stderr
    assert evaluate("x = 'a' * 10**12", ["1"]).status == "memory"


def test_run_many_keeps_order(box):
    jobs = [dict(code=f"import time; time.sleep({.2 if i == 0 else 0}); print({i})") if i % 2 == 0 else dict(code=f"x = {i}", expressions=["x"]) for i in range(7)]
    assert [r.stdout.strip() or r.values[0] for r in run_many(jobs, num_workers=3)] == ["0", 1, "2", 3, "4", 5, "6"]


def with_argument(text):
    """-> number of processes that have `text` as an argument."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += text.encode() in path.read_bytes().split(b"\0")
        except OSError:
            pass
    return found


def test_500_runs_leave_nothing(box, tmp_path, monkeypatch):
    for source in SOURCES:
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))      # its folder marks our boxes' command lines
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def state():
        return (sandbox_child.descendants(os.getpid()), with_argument(str(tmp_path)), sorted(os.listdir("/proc/self/fd")),
                Path("/proc/self/mounts").read_text(), sorted(os.listdir(tmp_path)))
    run_many([dict(code="")] * 8, num_workers=8)
    before = state()
    jobs = [dict(code=f"open('x', 'w').write('{i}')") for i in range(480)]
    jobs += [dict(code="import os, time\nif os.fork() == 0:\n  os.setsid(); time.sleep(60)")] * 10 + [dict(code="while True: print(1)")] * 10
    results = run_many(jobs, num_workers=8)
    assert [r.files["x"] for r in results[:480]] == [str(i).encode() for i in range(480)]
    assert [r.status for r in results[480:]] == ["ok"] * 10 + ["output_limit"] * 10
    assert state() == before


def test_box_dies_with_the_trainer(box, tmp_path):
    mark = f"9{os.getpid()}.25"
    code = f"import subprocess, time, os\nsubprocess.Popen(['/bin/sleep', '{mark}'], start_new_session=True); time.sleep(60)"
    trainer = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCES[0].parent)!r})\nimport sandbox\n"
                                f"sandbox._chosen = {sandbox.tier()!r}\nsandbox.run({code!r}, timeout=60)"])

    def wait_for(num):
        for _ in range(200):
            if with_argument(mark) == num:
                return True
            time.sleep(0.1)
    try:
        assert wait_for(1)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert wait_for(0)


# -----------------------------------------------------------------------------
# Choice of the tier

def test_a_box_that_does_not_start_raises(monkeypatch):
    monkeypatch.setattr(sandbox, "_chosen", None)
    monkeypatch.setattr(sandbox, "_python", "/bin/false")
    with pytest.raises(sandbox.SandboxUnavailable, match="--sandbox=auto does not work here: namespaces: .*landlock: .*none_i_accept"):
        run("print(1)")
    assert sandbox.tier() == "none"
    monkeypatch.setattr(sandbox, "_chosen", "namespaces")
    monkeypatch.setattr(sandbox, "_python", "/nonexistent")
    with pytest.raises(sandbox.SandboxUnavailable, match="/nonexistent"):
        run("print(1)")
    with pytest.raises(sandbox.SandboxUnavailable):
        run_many([dict(code="")] * 3)
    with pytest.raises(ValueError, match="--sandbox"):
        sandbox.choose("none")


def test_never_lowered_quietly(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "_chosen", None)
    monkeypatch.setattr(sandbox, "_self_test", lambda name: "refused" if name == "namespaces" else None)
    with pytest.raises(sandbox.SandboxUnavailable, match="--sandbox=namespaces does not work here: namespaces: refused"):
        sandbox.choose("namespaces")
    assert sandbox._chosen is None
    assert sandbox.choose("auto") == sandbox.tier() == "landlock"
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("sandbox: landlock; weaker than namespaces: the process table is shared") and line.endswith("(namespaces: refused)")
    assert sandbox.choose("none_i_accept") == sandbox.tier() == "none"
    assert "nothing but time, memory and size" in capsys.readouterr().out


def test_none_i_accept_limits_time_memory_and_size(monkeypatch):
    monkeypatch.setattr(sandbox, "_chosen", "none")
    assert run("print(input())", stdin="a").stdout == "a\n" and evaluate("x = 1", ["x"]).values == [1]
    assert run("while True: pass", timeout=0.3).status == "timeout" and run("x = bytearray(3 << 30)").status == "memory"
    assert run("print('x' * 10**6)").status == "output_limit"


def test_self_test_notices_a_box_with_a_hole(box, monkeypatch):
    assert sandbox._self_test(sandbox.tier()) is None
    assert sandbox._self_test("none").startswith("self-test: ")


# -----------------------------------------------------------------------------
# Wire form and call filter, without a box

def test_wire_form_by_hand():
    assert encode((1, "é", None), 99) == b"t\x03\0\0\0i\x01\0\0\0\x01s\x02\0\0\0\xc3\xa9N"
    assert encode({-1: [True]}, 99) == b"d\x02\0\0\0i\x01\0\0\0\xffl\x01\0\0\0T"
    for value in VALUES:
        assert decode(encode(value, 1000)) == value
    with pytest.raises(TooLarge):
        encode("x" * 95, 99)
    with pytest.raises(TooLarge):
        encode(1 << 14_001, 1 << 20)
    int_of_limit = (1 << 14_000) - 1
    assert decode(encode(-int_of_limit, 1 << 20)) == -int_of_limit and len(str(int_of_limit)) == 4215


@pytest.mark.parametrize("data", [b"", b"x", b"N" * 2, b"i\xff\xff\xff\xff", b"s\x01\0\0\0\xff", b"l\xff\xff\xff\xff", b"d\x01\0\0\0N", b"S\x01\0\0\0l\0\0\0\0",
                                  b"l\x01\0\0\0" * 100 + b"N", b"l\x01\0\0\0" * 10**5, b"f\0", b"i\xff\xff\0\0" + bytes(0xFFFF), b"t\x02\0\0\0N"])
def test_malformed_values_are_refused(data):
    with pytest.raises(Malformed):
        decode(data)


def test_damaged_values_raise_nothing_else():
    import random
    rng, whole = random.Random(0), encode(VALUES[1:], 10_000)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decode(bytes(data[:rng.randint(1, len(data))]))
        except Malformed:
            pass


def test_values_are_taken_in_order_and_only_with_the_key():
    key = b"k" * 16

    def frame(*message, key=key):
        data = encode(message, 1000)
        return key + len(data).to_bytes(4, "little") + data
    one, two, end = frame(0, "value", encode(1, 99)), frame(1, "value", encode(2, 99)), frame("end", "ok", "")
    missing = Failure("not_reached")
    assert sandbox._read_values(one + two + end, key, 2) == ([1, 2], "ok")
    assert sandbox._read_values(two + one + end, key, 2) == ([missing] * 2, None)
    assert sandbox._read_values(one + one + two, key, 2) == ([1, missing], None)
    assert sandbox._read_values(one + end + two, key, 2) == ([1, missing], "ok")
    assert sandbox._read_values(frame(0, "value", encode(1, 99), key=b"j" * 16), key, 1) == ([missing], None)
    assert sandbox._read_values(b"x" + one, key, 1) == ([missing], None) and sandbox._read_values(one[:-1], key, 1) == ([missing], None)
    assert sandbox._read_values(frame(0, "right", "x"), key, 1) == ([Failure("unsupported", "x")], None)


def verdict(program, arch, number, *arguments):
    """Interprets a seccomp program -> what it returns."""
    import struct
    data = struct.pack("=IIQ6Q", number, arch, 0, *(a % 2**64 for a in (*arguments, *[0] * 6)[:6]))
    steps, pc, a = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, yes, no, k = steps[pc]
        pc += 1
        if code == 0x06:
            return k
        if code == 0x20:
            a = int.from_bytes(data[k:k + 4], "little")
        else:
            pc += yes if {0x15: a == k, 0x35: a >= k, 0x45: a & k != 0}[code] else no


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


@pytest.mark.parametrize("machine", sandbox_child.ARCHITECTURES)
def test_call_filter(machine):
    column, arch = sandbox_child.ARCHITECTURES[machine]
    number = {name: int(row[column]) for name, row in sandbox_child.SYSCALLS.items() if row[column] != "-"}
    f = sandbox_child.call_filter(machine)
    for name in sandbox_child.REFUSED.keys() & number.keys():
        assert verdict(f, arch, number[name]) == EPERM, name
    read, openat, execve = (0, 257, 59) if machine == "x86_64" else (63, 56, 221)
    assert [verdict(f, arch, n, 5) for n in (read, openat, execve)] == [ALLOW] * 3
    assert verdict(f, arch ^ 0x80000000, read) == KILL and verdict(f, 0x40000003, read) == KILL
    if machine == "x86_64":
        assert verdict(f, arch, 0x40000000 + read) == KILL and verdict(f, arch, 0xFFFFFFFF) == KILL
    assert verdict(f, arch, number["clone3"]) == ENOSYS and verdict(f, arch, 457) == ENOSYS and verdict(f, arch, 456) == ALLOW
    for flags, expected in ((17, ALLOW), (0x003D0F00, ALLOW), (0x10000011, EPERM), (0x20000, EPERM), (0x40000000, EPERM)):
        assert verdict(f, arch, number["clone"], flags) == expected, hex(flags)
    assert verdict(f, arch, number["ioctl"], 0, 0x5412) == EPERM and verdict(f, arch, number["ioctl"], 0, 0x1_0000_5412) == EPERM
    assert verdict(f, arch, number["ioctl"], 0, 0x5401) == ALLOW and verdict(f, arch, number["prctl"], 15) == ALLOW
    assert verdict(f, arch, number["prlimit64"], 0) == ALLOW and verdict(f, arch, number["prlimit64"], 1234) == EPERM
    assert verdict(f, arch, number["kill"], 77) == ALLOW and verdict(f, arch, number["fchmodat"]) == ALLOW
    weak = sandbox_child.call_filter(machine, landlock_abi=2, own_pid=77)
    assert [verdict(weak, arch, number["kill"], p) for p in (77, 78, -1, 0)] == [ALLOW, EPERM, EPERM, EPERM]
    assert [verdict(weak, arch, number[n], 77) for n in ("tgkill", "tkill", "fchmodat", "truncate")] == [ALLOW, EPERM, EPERM, EPERM]
    assert verdict(sandbox_child.call_filter(machine, landlock_abi=6), arch, number["truncate"]) == ALLOW


def test_call_numbers_are_those_of_the_kernel_headers():
    seen = 0
    for header, column in (("x86_64-linux-gnu/asm/unistd_64.h", 0), ("asm-generic/unistd.h", 1)):
        path = Path("/usr/include") / header
        if path.exists():
            known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
            for name, row in sandbox_child.SYSCALLS.items():
                if name in known or row[column] == "-":
                    assert known.get(name, "-") == row[column], (header, name)
                    seen += 1
    if not seen:
        pytest.skip("no kernel headers are installed")
    assert seen > 90
