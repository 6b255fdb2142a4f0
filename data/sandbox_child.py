"""The set-up half of the sandbox: builds the box around a fresh interpreter. `sandbox.py` says what the box promises.

    trainer --exec--> keeper (this file: no secret in its memory, clean environment) --fork--> the box: the model's code

The keeper makes namespaces, root and working folder, forks, keeps the deadline, and reads the folder once everything
inside is dead; it never runs a line that the model wrote. The forked process gives up every right that it has (`confine`)
and only then returns to the few lines in `sandbox.py` that run the code. Standard library only, and few imports: most of
the time of a call is the start of this interpreter.
"""
import ctypes
import errno
import marshal
import os
import resource
import select
import stat
import struct
import sys
import time

__builtins__ = dict(__builtins__)       # what is defined below keeps the true len() when the model's code replaces it

SIGKILL = 9                             # `signal` imports enum, a tenth of the start
BOX_ID = 65534                          # uid and gid inside
MAX_DEPTH = 64                          # of a value
MAX_INT_BITS = 14_000                   # Python prints 4,300 digits; with more, showing a wrong answer would raise in the parent
MAX_FILES, MAX_FILES_BYTES, MAX_FOLDER_DEPTH = 256, 16 << 20, 8     # what is read back from the working folder
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# -----------------------------------------------------------------------------
# System calls by name: number on x86-64, number on arm64, - where it has none

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}       # column, AUDIT_ARCH


def numbers(text):
    return {name: row for name, *row in (line.split() for line in text.replace("\n", ";").split(";") if line.strip())}


REFUSED = numbers("""
    ptrace 101 117;  process_vm_readv 310 270;  process_vm_writev 311 271;  kcmp 312 272;  pidfd_getfd 438 438
    process_madvise 440 440;  process_mrelease 448 448;  perf_event_open 298 241;  bpf 321 280;  userfaultfd 323 282
    mount 165 40;  umount2 166 39;  pivot_root 155 41;  chroot 161 51;  open_tree 428 428;  move_mount 429 429;  fsopen 430 430
    fsconfig 431 431;  fsmount 432 432;  fspick 433 433;  mount_setattr 442 442;  swapon 167 224;  swapoff 168 225
    setns 308 268;  unshare 272 97;  add_key 248 217;  request_key 249 218;  keyctl 250 219;  memfd_secret 447 447
    io_uring_setup 425 425;  io_uring_enter 426 426;  io_uring_register 427 427;  splice 275 76;  tee 276 77;  vmsplice 278 75
    io_setup 206 0;  io_destroy 207 1;  io_submit 209 2;  io_cancel 210 3;  io_getevents 208 4;  io_pgetevents 333 292
    kexec_load 246 104;  kexec_file_load 320 294;  init_module 175 105;  finit_module 313 273;  delete_module 176 106
    socket 41 198;  socketpair 53 199;  bind 49 200;  listen 50 201;  accept 43 202;  connect 42 203;  accept4 288 242
    acct 163 89;  quotactl 179 60;  quotactl_fd 443 443;  reboot 169 142;  syslog 103 116;  vhangup 153 58;  seccomp 317 277
    settimeofday 164 170;  clock_settime 227 112;  clock_adjtime 305 266;  adjtimex 159 171;  sethostname 170 161
    setdomainname 171 162;  iopl 172 -;  ioperm 173 -;  modify_ldt 154 -;  uselib 134 -;  personality 135 92
    lookup_dcookie 212 18;  name_to_handle_at 303 264;  open_by_handle_at 304 265;  fanotify_init 300 262;  fanotify_mark 301 263
    mbind 237 235;  set_mempolicy 238 237;  migrate_pages 256 238;  move_pages 279 239;  remap_file_pages 216 234
    shmget 29 194;  shmctl 31 195;  shmat 30 196;  semget 64 190;  semctl 66 191;  semop 65 193;  semtimedop 220 192
    msgget 68 186;  msgctl 71 187;  msgrcv 70 188;  msgsnd 69 189;  mq_open 240 180;  mq_unlink 241 181
    setpriority 141 140;  ioprio_set 251 30
""")
# Landlock does not see these: a file of the same user could be made unreadable, or readable to all
REFUSED_METADATA = numbers("""
    chmod 90 -;  fchmod 91 52;  fchmodat 268 53;  fchmodat2 452 452;  chown 92 -;  lchown 94 -;  fchown 93 55;  fchownat 260 54
    setxattr 188 5;  lsetxattr 189 6;  fsetxattr 190 7;  removexattr 197 14;  lremovexattr 198 15;  fremovexattr 199 16
    utime 132 -;  utimes 235 -;  futimesat 261 -;  utimensat 280 88
""")
REFUSED_SIGNALS = numbers("kill 62 129; tkill 200 130; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240; pidfd_send_signal 424 424")
OTHERS = numbers("""
    clone 56 220;  clone3 435 435;  ioctl 16 29;  fcntl 72 25;  prctl 157 167;  truncate 76 45;  tgkill 234 131
    prlimit64 302 261;  sched_setaffinity 203 122;  sched_setscheduler 144 119;  sched_setparam 142 118;  sched_setattr 314 274
    landlock_create_ruleset 444 444;  landlock_add_rule 445 445;  landlock_restrict_self 446 446;  capset 126 91
""")
SYSCALLS = REFUSED | REFUSED_METADATA | REFUSED_SIGNALS | OTHERS
LAST_SYSCALL = 456          # futex_requeue of Linux 6.7; a call newer than this list does not exist inside
CLONE_NEW = 0x7E020000      # mount, cgroup, uts, ipc, user, pid, net
# option of prctl: pdeathsig, dumpable, seccomp, mm, timing, ptracer
PRCTL_OPTIONS = (1, 4, 22, 35, 14, 0x59616D61)
IOCTLS = (0x5412, 0x541C, 0x5423, 0x8901, 0x8902, 0x40086602, 0x401C5820)   # TIOCSTI, TIOCLINUX, TIOCSETD, owners, file attributes
FCNTLS = (8, 10, 15)        # F_SETOWN, F_SETSIG, F_SETOWN_EX: have the kernel send a signal elsewhere


def call_filter(machine, landlock_abi=None, own_pid=None):
    """-> seccomp program (bytes, 8 per instruction) for `machine`.

    `landlock_abi` is None where mount and pid namespaces separate already; `own_pid` set: signals to nobody else."""
    column, architecture = ARCHITECTURES[machine]
    allow, kill, refuse, not_implemented = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    ret, equal, at_least, has_bits = 0x06, 0x15, 0x35, 0x45

    def load(offset):
        return (0x20, 0, 0, offset)

    def argument(index):                # its low half, which is all that the kernel reads of an int
        return load(16 + 8 * index)

    def unless(index, test, value):     # refuse if the argument passes the test
        return [argument(index), (test, 0, 1, value), (ret, 0, 0, refuse), (ret, 0, 0, allow)]

    def one_of(index, values):
        return [argument(index), *(step for v in values for step in ((equal, 0, 1, v), (ret, 0, 0, refuse))), (ret, 0, 0, allow)]

    def only(index, value):
        return [argument(index), (equal, 0, 1, value), (ret, 0, 0, allow), (ret, 0, 0, refuse)]

    rules = dict.fromkeys(REFUSED, [(ret, 0, 0, refuse)])
    rules |= {"clone3": [(ret, 0, 0, not_implemented)], "clone": unless(0, has_bits, CLONE_NEW), "prctl": one_of(0, PRCTL_OPTIONS),
              "ioctl": one_of(1, IOCTLS), "fcntl": one_of(1, FCNTLS)}
    for name in ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        rules[name] = only(0, 0)        # of this process, not of another of the same user
    if landlock_abi is not None:
        rules |= dict.fromkeys(REFUSED_METADATA, [(ret, 0, 0, refuse)])
        if landlock_abi < 3:
            rules["truncate"] = [(ret, 0, 0, refuse)]
    if own_pid is not None:
        rules |= dict.fromkeys(REFUSED_SIGNALS, [(ret, 0, 0, refuse)]) | {"kill": only(0, own_pid), "tgkill": only(0, own_pid)}
    program = [load(4), (equal, 1, 0, architecture), (ret, 0, 0, kill), load(0)]
    if machine == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, kill)]            # the x32 calls
    program += [(at_least, 0, 1, LAST_SYSCALL + 1), (ret, 0, 0, not_implemented)]
    for name, block in rules.items():
        if SYSCALLS[name][column] != "-":
            program += [(equal, 0, len(block), int(SYSCALLS[name][column])), *block]
    program.append((ret, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *step) for step in program)


# -----------------------------------------------------------------------------
# The kernel, through ctypes

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(name, *args):
    number = int(SYSCALLS[name][ARCHITECTURES[os.uname().machine][0]])
    return check(libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *args))), name)


def prctl(option, *args):
    return check(libc.prctl(option, *(ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4])), f"prctl {option}")


def mount(source, target, kind, flags, options=None):
    check(libc.mount(*(x and x.encode() for x in (source, target, kind)), ctypes.c_ulong(flags), options and options.encode()),
          f"mount {kind or 'private'} on {target}")


def write(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as e:
        raise OSError(e.errno, f"write {path}: {e.strerror}") from None
    finally:
        os.close(fd)


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def library():
    """-> folders that the interpreter needs and that are not under /usr."""
    base = os.path.realpath(sys.base_prefix)
    wanted = {os.path.realpath(os.path.dirname(os.__file__)), os.path.realpath(os.path.join(base, "lib")),
              os.path.realpath(os.path.join(base, "bin"))}
    if base == "/":
        raise OSError(f"the interpreter's prefix is /: {sys.executable}")
    return sorted(p for p in wanted if not p.startswith("/usr/") and os.path.isdir(p))


# -----------------------------------------------------------------------------
# Values: one byte for the type, little-endian lengths; read back by `sandbox.decode`

CONTAINERS = ((list, b"l"), (tuple, b"t"), (set, b"S"), (frozenset, b"Z"), (dict, b"d"))


class TooLarge(Exception):
    pass


def encode(value, limit):
    """A value as bytes in the typed form. Subclasses lose what they added; TypeError for any other type, TooLarge beyond `limit`
    bytes or MAX_DEPTH levels (so for a list that holds itself). Methods are those of the base type, never ones that the model's
    code overrode."""
    out = bytearray()

    def sized(tag, data, size):
        if len(out) + len(data) > limit:
            raise TooLarge
        out.extend(tag + struct.pack("<I", size))

    def put(x, depth):
        kind = type(x)
        if depth > MAX_DEPTH or len(out) > limit:
            raise TooLarge
        if x is None or x is True or x is False:
            out.extend(b"N" if x is None else b"T" if x else b"F")
        elif issubclass(kind, int):
            x = int.__pos__(x)
            if x.bit_length() > MAX_INT_BITS:
                raise TooLarge
            data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
            sized(b"i", data, len(data))
            out.extend(data)
        elif issubclass(kind, float):
            out.extend(b"f" + struct.pack("<d", float.__pos__(x)))
        elif issubclass(kind, complex):
            x = complex.__pos__(x)
            out.extend(b"c" + struct.pack("<dd", x.real, x.imag))
        elif issubclass(kind, (str, bytes)):
            if (str if issubclass(kind, str) else bytes).__len__(x) > limit:
                raise TooLarge
            data = str.__str__(x).encode("utf-8", "surrogatepass") if issubclass(kind, str) else bytes.__getitem__(x, slice(None))
            sized(b"s" if issubclass(kind, str) else b"b", data, len(data))
            out.extend(data)
        else:
            base, tag = next((pair for pair in CONTAINERS if issubclass(kind, pair[0])), (None, None))
            if base is None:
                raise TypeError(f"a value of type {kind.__name__} does not leave the box")
            if base.__len__(x) > limit:
                raise TooLarge
            items = [part for pair in dict.items(x) for part in pair] if base is dict else [*base.__iter__(x)]
            sized(tag, b"", len(items))
            for item in items:
                put(item, depth + 1)

    put(value, 0)
    if len(out) > limit:
        raise TooLarge
    return bytes(out)


# -----------------------------------------------------------------------------
# Tier 1: namespaces

def enter_namespaces(job):
    """Moves the keeper into new namespaces and a new root: /usr and the interpreter read-only, three devices, /tmp. Its next child is
    pid 1 inside, and all that live there end with it."""
    uid, gid, keeper = os.getuid(), os.getgid(), os.getpid()
    if uid == 0:
        # only a process outside may map two ids: 0, to read an interpreter that lies under /root and to mount, and the box's own
        os.setgroups([])
        wait, go = os.pipe()
        mapper = os.fork()
        if mapper == 0:
            try:
                os.close(go)
                if os.read(wait, 1):
                    for name in ("gid_map", "uid_map"):
                        write(f"/proc/{keeper}/{name}", f"0 0 1\n{BOX_ID} {BOX_ID} 1\n")
                    os._exit(0)
            finally:
                os._exit(1)
    try:
        check(libc.unshare(CLONE_NEW), "unshare")
    except OSError:
        if uid == 0:
            os.close(go)
            os.waitpid(mapper, 0)
        raise
    if uid == 0:
        os.write(go, b"1")
        if os.waitpid(mapper, 0)[1]:
            raise OSError(errno.EPERM, f"cannot map uid {BOX_ID} into the new user namespace")
        os.close(go), os.close(wait)
    else:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{BOX_ID} {uid} 1")
        write("/proc/self/gid_map", f"{BOX_ID} {gid} 1")
    prctl(1, SIGKILL)                                                   # PR_SET_PDEATHSIG; unshare has cleared an earlier one
    prctl(4, 0)                                                         # PR_SET_DUMPABLE
    check(libc.sethostname(b"box", 3), "sethostname")

    nosuid_nodev, rdonly, nosuid, nodev, noexec = 2 | 4, 1, 2, 4, 8     # the same bits for mount() and mount_setattr()
    mount(None, "/", None, 0x44000)                                     # MS_REC | MS_PRIVATE
    trees = []
    for path in ("/usr", *library(), "/lib", "/lib64", "/bin", "/sbin", *DEVICES):
        if os.path.islink(path) and path.count("/") == 1:
            trees.append((path, os.readlink(path)))
        elif os.path.exists(path):
            fd = syscall("open_tree", -100, path.encode(), 1 | os.O_CLOEXEC | 0x8000)           # CLONE, recursive
            flags = rdonly | nosuid | (noexec if path in DEVICES else nodev)
            syscall("mount_setattr", fd, b"", 0x1000 | 0x8000, struct.pack("QQQQ", flags, 0, 0, 0), 32)
            trees.append((path, fd))
    mount("tmpfs", "/usr", "tmpfs", nosuid_nodev | noexec, "size=1m,nr_inodes=512,mode=755")    # any folder will do: it is left below
    os.chdir("/usr")
    os.mkdir("tmp")
    for path, source in trees:
        target = path[1:]
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        if isinstance(source, str):
            os.symlink(source, target)
            continue
        if path in DEVICES:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        else:
            os.makedirs(target, exist_ok=True)
        syscall("move_mount", source, b"", -100, target.encode(), 4)
        os.close(source)
    mount("tmpfs", "tmp", "tmpfs", nosuid_nodev | noexec, f"size={job['disk_bytes']},nr_inodes=4096,mode=700,uid={BOX_ID},gid={BOX_ID}")
    syscall("pivot_root", b".", b".")
    check(libc.umount2(b".", 2), "umount of the old root")              # MNT_DETACH
    os.chdir("/tmp")
    syscall("mount_setattr", -100, b"/", 0, struct.pack("QQQQ", rdonly, 0, 0, 0), 32)
    return "/tmp", BOX_ID


# -----------------------------------------------------------------------------
# Tier 2: Landlock

def landlock_abi():
    """-> version of the kernel's Landlock, 0 without it."""
    if os.uname().machine not in ARCHITECTURES:
        return 0
    try:
        return syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def restrict_files(folder):
    """This process and its children read /usr and the interpreter, use three devices, own `folder`; no TCP, no signals to the outside."""
    abi = landlock_abi()
    execute, write_file, read_file, read_dir, truncate = 1, 2, 4, 8, 1 << 14
    everything = (1 << 13) - 1 | (1 << 13) * (abi >= 2) | truncate * (abi >= 3) | (1 << 15) * (abi >= 5)
    attributes = struct.pack("QQQ", everything, 3 * (abi >= 4), 3 * (abi >= 6))
    ruleset = syscall("landlock_create_ruleset", attributes, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    readable = dict.fromkeys(("/usr", "/lib", "/lib64", "/bin", "/sbin", *library()), execute | read_file | read_dir)
    for path, rights in (readable | dict.fromkeys(DEVICES, read_file | write_file) | {folder: everything & ~execute}).items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            os.close(fd)
    prctl(38, 1)                                                        # PR_SET_NO_NEW_PRIVS
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def prepare_folder(job):
    """-> (the trainer's temporary folder, the box's uid). Root takes a uid that nobody else has, so that the box cannot signal, trace or
    renice anything outside, and its processes are counted alone."""
    folder, uid = job["folder"], os.getuid()
    if uid == 0 and job["tier"] == "landlock":
        uid = 2_000_000_000 + os.getpid()
        try:
            os.chown(folder, uid, uid)
        except OSError:                                                 # a container that maps few ids
            uid = BOX_ID
            os.chown(folder, uid, uid)
    prctl(36, 1)                                                        # PR_SET_CHILD_SUBREAPER: what is left over comes back to us
    return folder, uid


def descendants(pid):
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as f:
                    children.setdefault(int(f.read().rpartition(b")")[2].split()[1]), []).append(int(name))
            except OSError:
                pass
    found, new = [], children.get(pid, [])
    while new:
        found += new
        new = [child for parent in new for child in children.get(parent, ())]
    return found


def sweep():
    """Kills and reaps all that the box has left in the shared process table."""
    for _ in range(5000):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.001)
    raise OSError("processes of the box could not be killed")


# -----------------------------------------------------------------------------
# The box itself

def confine(job, folder, uid, keep):
    """Gives up everything but `keep` (file descriptors), the working folder, and plain system calls. No way back."""
    tier = job["tier"]
    privileged = tier == "namespaces" or os.getuid() == 0
    os.setsid()
    os.chdir(folder)
    stdin = os.memfd_create("stdin")
    write_all(stdin, job["stdin"])
    os.lseek(stdin, 0, 0)
    os.dup2(stdin, 0)
    low = 3
    for fd in (*sorted(keep), max(keep) + 256):                         # this young process has no higher one
        os.closerange(low, fd)
        low = fd + 1
    set_limits(job, alone=tier == "namespaces" or uid != os.getuid())
    if tier == "none":
        prctl(1, SIGKILL)
        return
    abi = None
    if tier == "landlock":
        restrict_files(folder)
        abi = landlock_abi()
    if privileged:
        for capability in range(64):
            if libc.prctl(24, ctypes.c_ulong(capability), 0, 0, 0) < 0:     # PR_CAPBSET_DROP, until there is no such capability
                break
        if tier == "landlock":
            os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    prctl(47, 4)                                                        # PR_CAP_AMBIENT, clear all
    syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    prctl(38, 1)                                                        # PR_SET_NO_NEW_PRIVS
    prctl(4, 0)                                                         # PR_SET_DUMPABLE
    prctl(1, SIGKILL)                                                   # PR_SET_PDEATHSIG, after the uid, which clears it
    if not os.access(os.__file__, os.R_OK):
        raise OSError(errno.EACCES, f"{os.__file__} cannot be read by uid {uid}: install Python where every user may read it")
    signals_need_the_filter = tier == "landlock" and abi < 6 and not privileged
    program = call_filter(os.uname().machine, abi, os.getpid() if signals_need_the_filter else None)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    prctl(22, 2, ctypes.addressof(header))                              # PR_SET_SECCOMP, filter


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]


def set_limits(job, alone):
    limits = dict(AS=job["memory_bytes"], CPU=job["cpu_seconds"], FSIZE=job["file_bytes"], NOFILE=64, NPROC=64 if alone else 200, CORE=0,
                  STACK=8 << 20, MEMLOCK=0, MSGQUEUE=0, SIGPENDING=64, RTPRIO=0, NICE=0)
    for name, limit in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def start():
    """Reads the job from stdin; returns it in the process that is confined, and nowhere else."""
    data = b""
    while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "little"):
        chunk = os.read(0, 1 << 20)
        if not chunk:
            os._exit(1)
        data += chunk
    job = marshal.loads(data[8:])                                       # from the trainer; nothing in the box can write here
    try:
        parent = os.getppid()
        write("/proc/self/oom_score_adj", "1000")                       # if memory ends, the box goes and the trainer stays
        os.set_inheritable(job["values_fd"], False)                     # what the model's code starts shall not hold it
        folder, uid = enter_namespaces(job) if job["tier"] == "namespaces" else prepare_folder(job)
        place_files(folder, job["files"], uid)
        ready, says_ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                confine(job, folder, uid, keep=(job["values_fd"], says_ready))
                os.write(says_ready, b"ready")                          # and if the keeper died before pdeathsig was set, this fails
            except BaseException as e:
                os.write(says_ready, describe(e).encode()[:1000])
                os._exit(1)
            os.close(says_ready)
            return job | dict(folder=folder)
        os.close(says_ready)
        os.close(job["values_fd"])
        said = b"".join(iter(lambda: os.read(ready, 4096), b""))
        if said != b"ready":
            raise OSError(said.decode() or "the box died before it was closed")
        report = ("done", *keep_watch(job, pid, parent), *collect(folder))
    except BaseException as e:
        report = ("unavailable", describe(e))
    write_all(job["report_fd"], encode(report, 2 * MAX_FILES_BYTES))
    os._exit(0)


def describe(e):
    return str(e.strerror or e) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"


def keep_watch(job, pid, parent):
    """Waits for the end, the deadline, a word from the trainer (it closes our stdin) or its death -> (wait status, timed out, wall seconds,
    CPU seconds). Nothing of the box runs when this returns."""
    begin = time.monotonic()
    poll = select.poll()
    poll.register(0, 0)                                                 # hang-up alone
    pidfd = os.pidfd_open(pid)
    poll.register(pidfd, select.POLLIN)
    while True:
        left = begin + job["timeout"] - time.monotonic()
        if left <= 0 or os.getppid() != parent or poll.poll(1000 * min(left, 1) + 1):
            break
    seconds = time.monotonic() - begin
    os.kill(pid, SIGKILL)                                               # no effect on what has ended: it is not reaped yet
    if job["tier"] != "namespaces":
        try:
            os.killpg(pid, SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    _, status, usage = os.wait4(pid, 0)
    if job["tier"] != "namespaces":
        sweep()
    return status, left <= 0, seconds, usage.ru_utime + usage.ru_stime


# -----------------------------------------------------------------------------
# Files in and out

def place_files(folder, files, uid):
    for name, data in files.items():                                    # names were checked by the trainer
        path = os.path.join(folder, name)
        parts = name.split("/")[:-1]
        for i in range(len(parts)):
            above = os.path.join(folder, *parts[:i + 1])
            if not os.path.isdir(above):
                os.mkdir(above, 0o700)
                os.chown(above, uid, uid) if uid != os.getuid() else None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        write_all(fd, data)
        os.fchown(fd, uid, uid) if uid != os.getuid() else None
        os.close(fd)


def collect(folder):
    """-> ({name: bytes} of regular files, number of entries left out). Links are not followed, and nothing else is opened."""
    files, left_out, size, stack = {}, 0, 0, [("", 0)]
    while stack:
        prefix, depth = stack.pop()
        try:
            names = sorted(os.listdir(os.path.join(folder, prefix)))
        except OSError:
            left_out += 1
            continue
        for name in names:
            path = os.path.join(folder, prefix, name)
            try:
                name.encode()                                           # a name that is not UTF-8 has no str
                info = os.lstat(path)
                if stat.S_ISDIR(info.st_mode) and depth < MAX_FOLDER_DEPTH:
                    stack.append((prefix + name + "/", depth + 1))
                    continue
                if not stat.S_ISREG(info.st_mode) or len(files) == MAX_FILES or size + info.st_size > MAX_FILES_BYTES:
                    left_out += 1
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                with open(fd, "rb") as f:
                    files[prefix + name] = f.read(info.st_size)
                size += info.st_size
            except (OSError, UnicodeEncodeError):
                left_out += 1
    return files, left_out
