//! What CloudStack's KVM agent does to one volume of one virtual machine, with its commands, on real libvirt and
//! QEMU; and beside it the truth of every snapshot.
//!
//! No guest system runs: the machine is paused, and QEMU's monitor writes as a guest would. The same writes go to
//! a raw file, which is copied at every snapshot. The members themselves are never asked for the truth.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use uuid::Uuid;

use super::chains::assert_true;
use super::libvirt::Libvirtd;
use super::mounts::{FsKind, LoopMount};
use super::qemu::{must, run, text};
use super::volume::is_base;
use super::world::World;

const MACHINE: &str = "i-2-7-VM";
/// The directory of the one volume, under `snapshots` and `checkpoints`.
const VOLUME: &str = "2/7";
const SIZE: &str = "16M";

/// A host with the machine, and the store that it mounts.
pub struct Agent {
    // In this order they go: the machine, then what it has open.
    libvirt: Libvirtd,
    mount: LoopMount,
    world: World,
    volume: PathBuf,
    /// The disk's name in the machine.
    label: &'static str,
    /// The living snapshots, base first.
    pub snapshots: Vec<String>,
}

impl Agent {
    /// A running machine with an empty disk, and an empty store, opted in.
    pub fn start() -> Self {
        let mount = LoopMount::in_memory(FsKind::Xfs, 512 << 20);
        for area in ["secondary/snapshots", "secondary/checkpoints"] {
            fs::create_dir_all(mount.path().join(area).join(VOLUME)).unwrap();
        }
        for area in ["primary", "truth"] {
            fs::create_dir(mount.path().join(area)).unwrap();
        }
        let libvirt = Libvirtd::start(&mount.path());
        let volume = mount.path().join("primary").join(Uuid::new_v4().to_string());
        let snapshots = Vec::new();
        let agent = Self { libvirt, mount, world: World::new(), volume, label: "sda", snapshots };
        must("qemu-img", &["create", "-q", "-f", "qcow2", text(&agent.volume), SIZE]);
        must("qemu-img", &["create", "-q", "-f", "raw", text(&agent.truth("now")), SIZE]);
        agent.qchain(&["init"]);
        agent.start_machine();
        agent
    }

    /// `secondary/AREA/ACCOUNT/VOLUME/NAME`.
    fn path(&self, area: &str, name: &str) -> PathBuf {
        self.mount.path().join("secondary").join(area).join(VOLUME).join(name)
    }

    /// The checkpoint file of a snapshot.
    pub fn checkpoint(&self, name: &str) -> PathBuf {
        self.path("checkpoints", name)
    }

    fn truth(&self, name: &str) -> PathBuf {
        self.mount.path().join("truth").join(name)
    }

    /// A file for the duration of one call.
    fn xml(&self, name: &str, content: &str) -> PathBuf {
        let path = self.world.directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn disk(&self) -> String {
        let unit = self.label.as_bytes()[2] - b'a';
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='{}' bus='scsi'/><address type='drive' unit='{unit}'/></disk>",
            text(&self.volume),
            self.label
        )
    }

    /// Starts the machine, paused.
    pub fn start_machine(&self) {
        let machine = format!(
            "<domain type='qemu'><name>{MACHINE}</name><memory unit='MiB'>32</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{}\
             <controller type='scsi' model='virtio-scsi'/><controller type='usb' model='none'/>\
             <memballoon model='none'/></devices></domain>",
            self.disk()
        );
        self.libvirt.must(&["create", text(&self.xml("machine.xml", &machine)), "--paused"]);
    }

    /// Stops it. QEMU stores the bitmaps in the volume; libvirt forgets the machine with its checkpoints.
    pub fn stop_machine(&self) {
        self.libvirt.must(&["destroy", MACHINE, "--graceful"]);
    }

    /// What a guest writes, as commands of qemu-io.
    pub fn writes(&self, commands: &[&str]) {
        let device = format!("scsi0-0-0-{}", self.label.as_bytes()[2] - b'a');
        for command in commands {
            let call = format!("qemu-io -d {device} \"{command}\"");
            let said = self.libvirt.must(&["qemu-monitor-command", MACHINE, "--hmp", &call]);
            assert_eq!(said.trim(), "", "{command}");
            must("qemu-io", &["-f", "raw", "-c", command, text(&self.truth("now"))]);
        }
    }

    /// `KVMStorageProcessor`'s incremental snapshot of a running machine: a push backup onto the store since the
    /// newest checkpoint, which then names its parent by an absolute path; and the checkpoint is saved.
    pub fn snapshot(&mut self) -> String {
        let name = Uuid::new_v4().to_string();
        let parent = self.snapshots.last().cloned();
        let target = self.path("snapshots", &name);
        let incremental = parent.as_ref().map(|parent| format!("<incremental>{parent}</incremental>"));
        let backup = format!(
            "<domainbackup>{}<disks><disk name='{}' type='file'><target file='{}'/><driver type='qcow2'/>\
             </disk></disks></domainbackup>",
            incremental.unwrap_or_default(),
            self.label,
            text(&target)
        );
        let checkpoint = format!(
            "<domaincheckpoint><name>{name}</name><disks><disk name='{}' checkpoint='bitmap'/></disks>\
             </domaincheckpoint>",
            self.label
        );
        let (backup, checkpoint) = (self.xml("backup.xml", &backup), self.xml("checkpoint.xml", &checkpoint));
        let files = ["--backupxml", text(&backup), "--checkpointxml", text(&checkpoint)];
        self.libvirt.must(&[&["backup-begin", "--domain", MACHINE][..], &files].concat());
        self.libvirt.until("the backup is made", || {
            let said = self.libvirt.must(&["domjobinfo", MACHINE, "--completed", "--keep-completed"]);
            said.lines().any(|line| line.starts_with("Job type:") && line.trim_end().ends_with("Completed"))
        });
        // Once without keeping it: the next one must not find this one.
        self.libvirt.must(&["domjobinfo", MACHINE, "--completed"]);
        // QEMU lets go of the file a moment after the job has completed.
        self.libvirt.until("QEMU has closed the backup", || {
            run("qemu-img", &["info", "-f", "qcow2", text(&target)]).status.success()
        });
        if let Some(parent) = &parent {
            let parent = self.path("snapshots", parent);
            let rebase = ["rebase", "-u", "-F", "qcow2", "-b", text(&parent), text(&target)];
            must("qemu-img", &rebase);
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).unwrap();
        fs::copy(self.truth("now"), self.truth(&name)).unwrap();
        self.save_checkpoint(&name, parent.as_deref());
        self.snapshots.push(name.clone());
        name
    }

    /// Dumps a checkpoint and saves it with the snapshot's parent as its own.
    fn save_checkpoint(&self, name: &str, parent: Option<&str>) {
        let dump = ["checkpoint-dumpxml", "--domain", MACHINE, "--checkpointname", name, "--no-domain"];
        let dumped = self.libvirt.must(&dump);
        let saved = match (dumped.split_once("<parent>"), parent) {
            (Some((before, rest)), Some(parent)) => {
                let (_, after) = rest.split_once("</parent>").unwrap();
                format!("{before}<parent><name>{parent}</name></parent>{after}")
            }
            (None, None) => dumped,
            _ => panic!("libvirt thinks of another parent than {parent:?}: {dumped}"),
        };
        fs::write(self.checkpoint(name), saved).unwrap();
    }

    /// Has libvirt forget all checkpoints, as before the disk is detached. The bitmaps stay.
    pub fn forget(&self) {
        loop {
            let listed = self.libvirt.must(&["checkpoint-list", MACHINE, "--name", "--leaves"]);
            let leaves: Vec<&str> = listed.split_whitespace().collect();
            for leaf in &leaves {
                self.libvirt.must(&["checkpoint-delete", MACHINE, leaf, "--metadata"]);
            }
            if leaves.is_empty() {
                return;
            }
        }
    }

    /// Has libvirt know one checkpoint again, from text.
    fn redefinition(&self, content: &str) -> Vec<String> {
        let file = self.xml("redefine.xml", content);
        let call = ["checkpoint-create", "--domain", MACHINE, "--xmlfile", text(&file), "--redefine"];
        call.map(str::to_owned).to_vec()
    }

    /// The same with the file of every living snapshot, base first, as CloudStack does when the machine has
    /// started or the disk was attached.
    pub fn redefine(&self) {
        for name in &self.snapshots {
            let call = self.redefinition(&fs::read_to_string(self.checkpoint(name)).unwrap());
            self.libvirt.must(&call.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let listed = self.libvirt.must(&["checkpoint-list", MACHINE, "--name", "--topological"]);
        let listed: Vec<&str> = listed.split_whitespace().collect();
        assert_eq!(listed.len(), self.snapshots.len(), "{listed:?}");
        // Where there are several bases libvirt has them in an order of its own.
        let place = |name: &str| listed.iter().position(|other| *other == name).unwrap();
        for (below, name) in self.snapshots.iter().zip(&self.snapshots[1..]) {
            let is_base = !fs::read_to_string(self.checkpoint(name)).unwrap().contains("<parent>");
            assert!(is_base || place(below) + 1 == place(name), "{listed:?}, not {:?}", self.snapshots);
        }
    }

    /// Gives libvirt a checkpoint that it must refuse; what it says.
    pub fn refused(&self, content: &str) -> String {
        let call = self.redefinition(content);
        self.libvirt.refused(&call.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Detaches the disk.
    pub fn detach(&self) {
        self.forget();
        let disk = self.xml("disk.xml", &self.disk());
        self.libvirt.must(&["detach-device", MACHINE, text(&disk)]);
        self.libvirt.until("the disk is detached", || {
            !self.libvirt.must(&["domblklist", MACHINE]).contains(text(&self.volume))
        });
    }

    /// Attaches it under another name, and puts that into the checkpoint files, in place.
    pub fn attach(&mut self, label: &'static str) {
        let old = format!("name='{}'", self.label);
        self.label = label;
        for name in &self.snapshots {
            let path = self.checkpoint(name);
            let content = fs::read_to_string(&path).unwrap();
            assert!(content.contains(&old), "{content}");
            fs::write(&path, content.replace(&old, &format!("name='{label}'"))).unwrap();
        }
        let disk = self.xml("disk.xml", &self.disk());
        self.libvirt.must(&["attach-device", MACHINE, text(&disk)]);
        self.redefine();
    }

    /// Moves the volume of the stopped machine to other primary storage, with its bitmaps.
    pub fn migrate(&mut self) {
        let moved = self.volume.with_file_name(Uuid::new_v4().to_string());
        let call = ["convert", "--bitmaps", "-f", "qcow2", "-O", "qcow2", text(&self.volume), text(&moved)];
        must("qemu-img", &call);
        fs::remove_file(&self.volume).unwrap();
        self.volume = moved;
    }

    fn qchain(&self, arguments: &[&str]) {
        let store = self.mount.path().join("secondary");
        let (exit, document) = self.world.run_on(text(&store), arguments);
        assert_eq!(exit, 0, "{arguments:?}: {document}");
    }

    /// Deletes a snapshot by qchain; neither it nor its checkpoint file may be left.
    pub fn delete(&mut self, name: &str) {
        self.qchain(&["delete", "--assume-deleted", "--yes", "--now", "--grace", "0s", name]);
        assert!(!self.path("snapshots", name).exists() && !self.checkpoint(name).exists());
        self.snapshots.retain(|other| other != name);
    }

    /// Makes a snapshot a full base by qchain; nobody goes.
    pub fn consolidate(&self, name: &str) {
        self.qchain(&["consolidate", "--yes", "--now", "--grace", "0s", "--retention", "0s", name]);
        let told = fs::read_to_string(self.checkpoint(name)).unwrap();
        assert!(is_base(&self.path("snapshots", name)) && !told.contains("<parent>"), "{told}");
    }

    /// Fails unless QEMU restores every living snapshot to what the disk held then, and the newest to what it
    /// holds.
    pub fn is_true(&self) {
        for name in &self.snapshots {
            assert_true(&self.path("snapshots", name), &self.truth(name), "restored");
        }
        let newest = self.path("snapshots", self.snapshots.last().unwrap());
        assert_true(&newest, &self.truth("now"), "the disk as it is");
    }
}
