"""A real Slurm on this host: munged, slurmctld and one slurmd a node, with fake GPUs. As root; no systemd, no cgroups.

    python tests/support/cluster.py install        Debian's packages, when they are absent
    python tests/support/cluster.py run 4 COMMAND…  COMMAND on a cluster of 4 nodes, which ends with it

Each node has its own host name, network namespace and address, so that a link can be cut. The daemons are our children
and end with us, whatever ends us; a job's processes are ended by `stop`, which then looks for leftovers.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
BRIDGE, NETWORK = "megarl-slurm", "10.223.0"
CONTROLLER = f"{NETWORK}.254"
GPUS, CPUS, MEMORY = 8, 64, 20000  # of each node, as Slurm believes
START_DEADLINE = 120.0
POLL = 0.25

CONFIG = """\
ClusterName=megarl
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its last run have expired.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=64
GresTypes=gpu
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=20
MessageTimeout=15
# Ended jobs stay known, so that a test may ask about them.
MinJobAge=7200
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """`with Cluster(nodes) as cluster:`; `cluster.environment` is what sbatch and the others need."""

    def __init__(self, nodes: int) -> None:
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="megarl-slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def slurm(
        self, *command: str, deadline: float = 60.0, check: bool = True, cwd: Path | None = None, **more: str
    ) -> str:
        """The output of a Slurm command; `more` is added to its environment."""
        done = subprocess.run(
            command, env=self.environment | more, cwd=cwd, capture_output=True, text=True, timeout=deadline, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def link(self, node: str, up: bool) -> None:
        """Plug a node's network cable in, or pull it. Plugged in, the node is taken back as an administrator would."""
        _ip("link", "set", _port(node), "up" if up else "down")
        if up:  # Slurm itself looks for a lost node once in a minute or more; one that it has not missed, it refuses
            self.slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def processes(self, job: str | None = None, node: str | None = None) -> list[int]:
        """Processes of a job, or of any job of this cluster; on a node, or on all."""
        of = {"SLURM_CONF": f"{self.folder}/slurm.conf", "SLURM_JOB_ID": job, "SLURMD_NODENAME": node}
        wanted = {f"{name}={value}".encode() for name, value in of.items() if value is not None}
        mine = {os.getpid(), *(daemon.pid for daemon in self._daemons)}
        return [
            pid
            for pid, _, variables in _living()
            if pid not in mine and wanted <= variables and any(v.startswith(b"SLURM_JOB_ID=") for v in variables)
        ]

    def _step_daemons(self) -> list[int]:
        own = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        return [pid for pid, name, variables in _living() if name == "slurmstepd" and own in variables]

    def stop(self) -> None:
        """Cancel every job, end the daemons, remove the network and the folder. Raises when a job left a process."""
        if self._daemons:
            self.slurm("scancel", "--user=root", check=False)
            wait_for(lambda: not self.slurm("squeue", "--noheader", check=False).strip(), "the queue to empty", 40)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []
        for pid in self._step_daemons():  # Slurm 22.05 now and then forgets one of a node that it lost
            os.kill(pid, signal.SIGKILL)
        _remove_network()
        shutil.rmtree(self.folder)
        if left:
            raise RuntimeError(f"processes {left} outlived their jobs")

    def _start(self) -> None:
        for name in ("state", "spool", "log", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        self._write_config()
        self._build_network()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "log/munged.log"}
        options = [f"--{name}={self.folder / file}" for name, file in {**files, "seed-file": "munge.seed"}.items()]
        self._daemon([], ["munged", "--foreground", "--force", *options])
        wait_for((self.folder / "munge.sock").exists, "munged", START_DEADLINE)
        self._daemon(self._own_name("controller"), ["slurmctld", "-D", "-c"])
        for node in self.names:
            inside = ["nsenter", f"--net=/run/netns/{_space(node)}"]
            self._daemon([*inside, *self._own_name(node)], ["slurmd", "-D", "-N", node])
        wait_for(self.idle, f"{len(self.names)} nodes to be idle", START_DEADLINE)

    def idle(self) -> bool:
        """Whether every node is up and free. Raises RuntimeError when a daemon has ended."""
        for daemon in self._daemons:
            if daemon.poll() is not None:
                raise RuntimeError(f"{daemon.args} ended; see {self.folder}/log")
        states = self.slurm("sinfo", "--noheader", "--Node", "--partition=gpu", "--states=idle", check=False)
        return len([line for line in states.splitlines() if line.startswith("node")]) == len(self.names)

    def _daemon(self, place: Sequence[str], command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("ab") as log:
            line = ["setpriv", "--pdeathsig", "TERM", *place, *command]
            self._daemons.append(subprocess.Popen(line, env=self.environment, stdout=log, stderr=log))

    def _own_name(self, name: str) -> list[str]:
        """Host and mount namespaces in which this host is called `name` and knows the others."""
        own = f"mount --make-rprivate / && mount --bind {self.folder}/hosts /etc/hosts && hostname {name}"
        return ["unshare", "--mount", "--uts", "sh", "-c", f'{own} && exec "$@"', "sh"]

    def _write_config(self) -> None:
        devices = self.folder / "dev"
        devices.mkdir()
        for i in range(GPUS):  # Slurm wants device files, else it drains the node: /dev/null's twins
            os.mknod(devices / f"nvidia{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        hosts = "".join(f"{_address(node)} {node}\n" for node in self.names)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{CONTROLLER} controller\n{hosts}")
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={','.join(self.names)} Name=gpu File={devices}/nvidia[0-{GPUS - 1}] "
            "Flags=nvidia_gpu_env\n"
        )
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={_address(node)} CPUs={CPUS} RealMemory={MEMORY} "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for node in self.names
        )
        text = CONFIG.format(folder=self.folder, controller=CONTROLLER, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)

    def _build_network(self) -> None:
        _remove_network()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{CONTROLLER}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for node in self.names:
            space = _space(node)
            _ip("netns", "add", space)
            _ip("link", "add", _port(node), "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", _port(node), "master", BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{_address(node)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")


def wait_for(condition: Callable[[], object], what: str, seconds: float, poll: float = POLL) -> None:
    """Look every `poll` seconds until `condition()` holds; raises TimeoutError naming `what`."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"gave up after {seconds:g} s waiting for {what}")
        time.sleep(poll)


def install() -> None:
    """Install Debian's packages when a program is absent. SystemExit says why a Slurm cannot run on this machine."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        if os.geteuid() or shutil.which("apt-get") is None:
            raise SystemExit(f"test-slurm: no {', '.join(missing)} here: install Slurm's server, or be root on Debian")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        for command in (["apt-get", "update", "-qq"], install):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                why = " ".join(done.stdout.split())[-500:]
                raise SystemExit(f"test-slurm: no {', '.join(missing)} here, and '{' '.join(command)}' failed: {why}")
    done = subprocess.run(["unshare", "--mount", "--uts", "--net", "true"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"test-slurm: needs root with its own namespaces for the nodes: {done.stderr.strip()}")


def _living() -> Iterator[tuple[int, str, set[bytes]]]:
    """Every process but zombies: its id, its name and its environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = set((entry / "environ").read_bytes().split(b"\0"))
            name, zombie = (entry / "comm").read_text().strip(), " Z " in (entry / "stat").read_text()
        except OSError:
            continue
        if not zombie:
            yield int(entry.name), name, variables


def _remove_network() -> None:
    """Also what an earlier, killed cluster left."""
    for space in Path("/run/netns").glob(f"{BRIDGE}-*"):
        _ip("netns", "del", space.name)
    for port in Path("/sys/class/net").glob(_port("node*")):  # a process that was left keeps its end alive
        subprocess.run(["ip", "link", "del", port.name], capture_output=True, timeout=10)  # it may go just now
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _ip("link", "del", BRIDGE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)


def _space(node: str) -> str:
    return f"{BRIDGE}-{node}"


def _port(node: str) -> str:
    return f"megarl-{node}"  # at most 15 characters


def _address(node: str) -> str:
    return f"{NETWORK}.{node.removeprefix('node')}"


def main(arguments: list[str]) -> int:
    match arguments:
        case ["install"]:
            install()
            return 0
        case ["run", nodes, *command] if nodes.isdigit() and command:
            with Cluster(int(nodes)) as cluster:
                return subprocess.run(command, env=cluster.environment, check=False).returncode
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
