"""The probes of the system call filter: with arguments that do nothing even where they are let through."""

import platform

SUPPORTED = platform.machine() == "x86_64"

_BAD = 1  # an address that no process has

# Name: number and arguments of a call that a sandbox must be refused.
FORBIDDEN = {
    "unshare(CLONE_NEWUSER)": (272, 0x10000000),
    "unshare(CLONE_NEWNS)": (272, 0x00020000),
    "clone(CLONE_NEWUSER)": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "clone(CLONE_PARENT)": (56, 0x8000 | 17, 0, 0, 0, 0),
    "setns": (308, -1, 0),
    "mount": (165, _BAD, _BAD, _BAD, 0, 0),
    "umount2": (166, _BAD, 0),
    "pivot_root": (155, _BAD, _BAD),
    "chroot": (161, _BAD),
    "open_tree": (428, -1, _BAD, 0),
    "move_mount": (429, -1, _BAD, -1, _BAD, 0),
    "fsopen": (430, _BAD, 0),
    "fsmount": (432, -1, 0, 0),
    "fspick": (433, -1, _BAD, 0),
    "mount_setattr": (442, -1, _BAD, 0, _BAD, 0),
    "ptrace(PTRACE_ATTACH)": (101, 16, 2**22, 0, 0),
    "process_vm_readv": (310, 2**22, 0, 0, 0, 0, 0),
    "process_vm_writev": (311, 2**22, 0, 0, 0, 0, 0),
    "pidfd_getfd": (438, -1, 0, 0),
    "kcmp": (312, 2**22, 2**22, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "perf_event_open": (298, _BAD, 0, -1, -1, 0),
    "userfaultfd": (323, 0),
    "io_uring_setup": (425, 1, _BAD),
    "io_uring_enter": (426, -1, 0, 0, 0, 0),
    "io_uring_register": (427, -1, 0, 0, 0),
    "vmsplice": (278, -1, _BAD, 1, 0),
    "memfd_secret": (447, 0xFFFF),
    "keyctl": (250, 99, 0, 0, 0, 0),
    "add_key": (248, _BAD, _BAD, 0, 0, 0),
    "request_key": (249, _BAD, _BAD, 0, 0),
    "kexec_load": (246, 0, 99, 0, 0xFF00),
    "init_module": (175, _BAD, 0, _BAD),
    "finit_module": (313, -1, _BAD, 0),
    "delete_module": (176, _BAD, 0),
    "reboot": (169, 0, 0, 0, 0),
    "swapon": (167, _BAD, 0),
    "swapoff": (168, _BAD),
    "settimeofday": (164, _BAD, 0),
    "clock_settime": (227, 0, _BAD),
    "iopl": (172, 4),
    "ioperm": (173, 0, 0, 1),
    "open_by_handle_at": (304, -1, _BAD, 0),
    "syslog": (103, 10, 0, 0),
    "acct": (163, _BAD),
    "quotactl": (179, 0, _BAD, 0, 0),
    "fanotify_init": (300, 0xFFFF0000, 0),
    "sethostname": (170, _BAD, 1),
    "setdomainname": (171, _BAD, 1),
    "lookup_dcookie": (212, 0, _BAD, 0),
    "personality(ADDR_NO_RANDOMIZE)": (135, 0x0040000),
    "socket(AF_VSOCK)": (41, 40, 1, 0),
    "socket(AF_PACKET)": (41, 17, 3, 0),
    "socket(AF_NETLINK, NETLINK_NETFILTER)": (41, 16, 3, 12),
    "socket(AF_ALG)": (41, 38, 5, 0),
    "socket(AF_KEY)": (41, 15, 3, 2),
    "socket(AF_XDP)": (41, 44, 3, 0),
    "socket(AF_INET, SOCK_RAW)": (41, 2, 3, 1),
    "setuid(0)": (105, 0),
    "setgid(0)": (106, 0),
    "setresuid(0)": (117, 0, 0, 0),
    "setgroups": (116, 0, 0),
}

# These are answered as if the kernel had never heard of them: programs then take another way.
UNKNOWN = {
    "clone3": (435, _BAD, 88),
    "io_setup": (206, 1, _BAD),
}

# Refused as well to a root that has SYS_ADMIN, SYS_PTRACE and no filter: each wants a capability of its own.
NEED_MORE = frozenset(["acct", "reboot", "syslog"])


def probe(table: dict[str, tuple[int, ...]]) -> str:
    """Code that makes the calls of a table; goes after arena.SYSCALLS. One process for each: a call that is
    let through may change the process that makes it."""
    return f"""
results = {{}}
for name, numbers in {table!r}.items():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        me = os.getpid()
        answer = call(*numbers)
        if os.getpid() == me:
            os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    results[name] = os.read(reader, 100).decode()
    os.close(reader)
    os.waitpid(pid, 0)
print(json.dumps(results))
"""
