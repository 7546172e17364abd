"""Which system calls a program in the sandbox may make: a list of those that are allowed, as the kernel's filter.

What is not on the list does not exist for the program (ENOSYS): no shared memory that outlives a mapping or belongs
to no process (System V's, `memfd_create`, message queues), no look at other processes (`ptrace`,
`process_vm_readv`), no other program (`execve`), no keys, no `io_uring`, no `bpf`, no mounts, no new namespaces, and
nothing that a later kernel brings. A few calls are allowed for some arguments only (EPERM for others).

The filter is a program of the classic BPF: for each call a comparison of its number, and what to return.
"""

from __future__ import annotations

import platform
import struct
import sys

# Name, number on x86-64 and on AArch64 ('-': not there). From Linux's asm/unistd_64.h and asm-generic/unistd.h.
_CALLS = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
preadv2:327:286 pwritev2:328:287 sendfile:40:71 copy_file_range:326:285 lseek:8:62 open:2:- openat:257:56 creat:85:-
close:3:57 close_range:436:436 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 fcntl:72:25 flock:73:32
fsync:74:82 fdatasync:75:83 ftruncate:77:46 truncate:76:45 fallocate:285:47 fadvise64:221:223 stat:4:- fstat:5:80
lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44 access:21:- faccessat:269:48
faccessat2:439:439 readlink:89:- readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49
fchdir:81:50 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38
renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 chmod:90:- fchmod:91:52 fchmodat:268:53
umask:95:166 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:-
munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 msync:26:227 mincore:27:232
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigsuspend:130:133 rt_sigpending:127:136
rt_sigtimedwait:128:137 sigaltstack:131:132 kill:62:129 tkill:200:130 tgkill:234:131 pause:34:- alarm:37:-
getitimer:36:102 setitimer:38:103 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113
clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165
fork:57:- vfork:58:- exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 restart_syscall:219:128 futex:202:98
futex_waitv:449:449 set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96 rseq:334:293
membarrier:324:283 arch_prctl:158:- setsid:112:157 setpgid:109:154 sched_yield:24:124 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
getpriority:140:141 getcpu:309:168 getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174 geteuid:107:175
getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 getpgid:121:155 getpgrp:111:-
getsid:124:156 uname:63:160 sysinfo:99:179 getrlimit:97:163 setrlimit:160:164 getrandom:318:278
poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19 bind:49:200 connect:42:203
listen:50:201 accept:43:202 accept4:288:242 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209 setsockopt:54:208
"""
_LOOKED_AT = "mmap:9:222 clone:56:220 prctl:157:167 socket:41:198 socketpair:53:199 ioctl:16:29 prlimit64:302:261"
_LOOKED_AT += " fcntl:72:25"

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables, and the kernel's name of the architecture."""
_X32 = 0x40000000
"""From here on numbers are those of x86's other interface, which the list does not know."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ENOSYS, _EPERM, _KILL = 0x7FFF0000, 0x00050000 | 38, 0x00050000 | 1, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in what the filter sees of a call (`struct seccomp_data`)."""

Instruction = tuple[int, int, int, int]


def compiled() -> list[Instruction] | None:
    """The filter for this machine; None where there is no list for its processor.

    Each instruction is (code, jump if true, jump if false, number), as in `struct sock_filter`.
    """
    if platform.machine() not in _MACHINES or sys.byteorder != "little" or struct.calcsize("P") != 8:
        return None
    column, architecture = _MACHINES[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    looked_at = _numbers(_LOOKED_AT, column)
    for name, rule in _rules().items():
        program += [(_EQUAL, 0, len(rule), looked_at[name]), *rule]
    for name, number in _numbers(_CALLS, column).items():
        if name not in looked_at:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    return [*program, (_RETURN, 0, 0, _ENOSYS)]


def _rules() -> dict[str, list[Instruction]]:
    namespaces = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
    sockets = [*_argument(0, (1, 2, 10)), *_argument(2, (0, 6, 17)), (_RETURN, 0, 0, _ALLOW)]
    return {
        # Huge pages are in no process's resident memory.
        "mmap": _without_bits(3, 0x40000),
        "clone": _without_bits(0, namespaces),
        # Its name, for threads.
        "prctl": [*_argument(0, (15, 16)), (_RETURN, 0, 0, _ALLOW)],
        # Unix's, IPv4 and IPv6 with TCP and UDP: others (vsock, netlink, the kernel's cryptography) know no namespace
        # of networks, or are seldom used and so seldom looked at.
        "socket": sockets,
        "socketpair": sockets,
        # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
        "ioctl": [
            *_argument(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
            (_RETURN, 0, 0, _ALLOW),
        ],
        # Its own limits alone.
        "prlimit64": [*_argument(0, (0,)), (_RETURN, 0, 0, _ALLOW)],
        # F_SETPIPE_SZ: what lies in pipes is in no process's memory.
        "fcntl": [
            (_LOAD, 0, 0, _FIRST_ARGUMENT + 8),
            (_EQUAL, 0, 1, 1031),
            (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ],
    }


def _argument(place: int, allowed: tuple[int, ...]) -> list[Instruction]:
    """Goes on where the argument (its lower 32 bits: the kernel reads no more of these) is one of them; else EPERM."""
    checks = [(_EQUAL, len(allowed) - index, 0, value) for index, value in enumerate(allowed)]
    return [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * place), *checks, (_RETURN, 0, 0, _EPERM)]


def _without_bits(place: int, bits: int) -> list[Instruction]:
    return [
        (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * place),
        (_ANY_BIT, 0, 1, bits),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _numbers(calls: str, column: int) -> dict[str, int]:
    entries = (entry.split(":") for entry in calls.split())
    return {name: int(numbers[column]) for name, *numbers in entries if numbers[column] != "-"}
