//! A libvirt of our own: the real daemon, with nothing of this host's.
//!
//! It lives in namespaces: its configuration, state, sockets and logs are directories of ours mounted over the
//! host's, so a libvirt of the host neither sees nor is seen; no network of the host's is in reach; and when
//! its first process goes, the kernel ends every QEMU that it started.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::forked::Running;
use super::qemu::text;

/// How long anything of libvirt may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// What the test machine cannot or need not do: there may be no cgroups and no security module, and QEMU's
/// output goes to a file, without a further daemon for that.
const DRIVER: &str = "user = \"root\"
group = \"root\"
security_driver = \"none\"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = \"file\"
";

/// Who may call: whoever reaches the socket.
const DAEMON: &str = "auth_unix_rw = \"none\"
auth_unix_ro = \"none\"
unix_sock_dir = \"/run/libvirt\"
log_outputs = \"3:file:/var/log/libvirt/libvirtd.log\"
";

/// The first process of the namespaces. Mounts of other tests are let go at once: a copy of one keeps its loop
/// device busy. It stays the shell, since somebody has to wait for the QEMUs that libvirt leaves to it.
const FIRST: &str = r#"
set -e
while read -r source place kind _; do
    case $source:$kind in
        /dev/loop*:* | *:fuse*) case $2/ in "$place"/*) ;; *) umount --lazy "$place" || true ;; esac ;;
    esac
done </proc/self/mounts
for pair in etc:/etc/libvirt lib:/var/lib/libvirt log:/var/log/libvirt cache:/var/cache/libvirt run:/run; do
    mkdir -p "${pair#*:}"
    mount --bind "$1/${pair%%:*}" "${pair#*:}"
done
libvirtd --config /etc/libvirt/libvirtd.conf &
wait $!
"#;

/// The daemon. It and its domains end when this goes.
pub struct Libvirtd {
    // Ends before its directory goes.
    _first: Running,
    directory: TempDir,
}

impl Libvirtd {
    /// Starts it, and waits until it answers. Of the mounts on loop devices it keeps only that of `store`.
    pub fn start(store: &Path) -> Self {
        for program in ["libvirtd", "virsh", "qemu-system-x86_64"] {
            let found = Command::new(program).arg("--version").output();
            found.unwrap_or_else(|error| {
                panic!("{program} is needed for this test ({error}): scripts/check installs it")
            });
        }
        let directory = tempfile::Builder::new().prefix("qchain-libvirt-").tempdir().unwrap();
        let place = directory.path();
        fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["etc", "lib", "log/qemu", "cache", "run/libvirt"] {
            fs::create_dir_all(place.join(name)).unwrap();
        }
        fs::write(place.join("etc/qemu.conf"), DRIVER).unwrap();
        fs::write(place.join("etc/libvirtd.conf"), DAEMON).unwrap();
        let mut command = Command::new("setpriv");
        // The first ends them if this thread ends without a word, the second if `unshare` does.
        command.args(["--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["--mount", "--pid", "--net", "--ipc", "bash", "-c", FIRST, "first", text(place)]);
        command.arg(store);
        let daemon = Self { _first: Running::start(command), directory };
        daemon.until("libvirtd answers", || daemon.virsh(&["version"]).status.success());
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/libvirt/libvirt-sock")
    }

    /// Runs virsh to its end. It is ended if it does not come to one.
    pub fn virsh(&self, arguments: &[&str]) -> Output {
        Command::new("timeout")
            .args([&PATIENCE.as_secs().to_string(), "virsh", "--quiet", "--connect"])
            .arg(format!("qemu+unix:///system?socket={}", text(&self.socket())))
            .args(arguments)
            .env("LC_ALL", "C")
            .output()
            .unwrap()
    }

    /// Runs what must succeed; gives its standard output.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        assert!(output.status.success(), "virsh {arguments:?}: {output:?}\n{}", self.log());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs what must fail; gives what it says.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        assert!(!output.status.success(), "virsh {arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Waits for something.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < PATIENCE, "not yet: {what}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log/libvirtd.log")).unwrap_or_default()
    }
}
