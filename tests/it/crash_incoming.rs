//! Increments that are being made while others are deleted: libvirt writes one without a backing file, `rebase
//! -u` names its parent later, the checkpoint file comes last. Nothing of it is touched, whatever its stage.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use qchain::failure::{Code, Failure};
use qchain::ops::delete::ModeChoice;
use qchain::store::record::StoreKind;

use super::support::chains::assert_true;
use super::support::crash::{Chain, Shape, checkpoint, outside, seed, uuid};
use super::support::qemu::{io, must, text};
use super::support::store::{delete, delete_well, files, init, open, scan};

const MIB: usize = 1 << 20;

/// One increment of a volume, named by its number.
struct Increment {
    root: PathBuf,
    number: usize,
}

fn named(number: usize) -> String {
    format!("0f9619ff-8b86-4d01-b42d-{number:012}")
}

impl Increment {
    fn image(&self) -> PathBuf {
        self.root.join("snapshots/2/7").join(named(self.number))
    }

    /// The file as the backup job writes it.
    fn written(&self) {
        must("qemu-img", &["create", "-q", "-f", "qcow2", text(&self.image()), "1M"]);
        let write = format!("write -P {} {}k 64k", self.number + 1, 64 * (self.number % 16));
        io(&self.image(), &[&write]);
    }

    fn based(&self, parent: &str) {
        must("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", parent, "-F", "qcow2", text(&self.image())]);
    }

    fn noted(&self, parent: Option<&str>) {
        let file = checkpoint(&named(self.number), parent);
        fs::write(self.root.join("checkpoints/2/7").join(named(self.number)), file).unwrap();
    }
}

fn stamp(path: &Path) -> (u64, i64, i64, Vec<u8>) {
    let data = fs::metadata(path).unwrap();
    (data.ino(), data.ctime(), data.ctime_nsec(), fs::read(path).unwrap())
}

#[test]
fn each_stage_of_an_increment_is_left_alone() {
    let chain = Chain::make(Shape::Cloudstack, seed());
    let tip = format!("snapshots/2/7/{}", uuid("c"));
    for stage in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("s");
        chain.put(&root);
        let new = Increment { root: root.clone(), number: 7 };
        new.written();
        if stage > 0 {
            new.based(&uuid("c"));
        }
        if stage > 1 {
            // Its parent is not yet the one that its header names.
            new.noted(Some(&uuid("b")));
        }
        let before = stamp(&new.image());
        let found = scan(&open(&root));
        let incoming: Vec<&str> = found
            .members
            .iter()
            .filter(|member| member.incoming.is_some())
            .map(|member| member.key.path.file_name())
            .collect();
        assert_eq!(incoming, [named(7)], "stage {stage}");
        // Its parent to be, or already its parent, does not go, nor does it itself.
        let state = outside(&root);
        for refused in [&tip, &format!("snapshots/2/7/{}", named(7))] {
            let report = delete(&open(&root), &[refused], ModeChoice::Copy);
            let error = match report {
                Err(error) => error,
                Ok(mut report) => report.outcomes.remove(0).error.unwrap(),
            };
            assert_eq!(error.code(), Code::Incoming, "stage {stage}: {refused}: {error}");
        }
        assert!(state == outside(&root), "stage {stage}");
        delete_well(&root, &[&chain.deleted[0]], ModeChoice::Copy);
        assert!(before == stamp(&new.image()), "stage {stage}");
        for name in &chain.survivors {
            assert_true(&root.join(name), &chain.truth(name), &format!("stage {stage}"));
        }
    }
}

/// The members that have all that they need, by number; what is incoming is not among them.
fn ready(root: &Path) -> Vec<usize> {
    let found = scan(&open(root));
    let whole = found.members.iter().filter(|member| member.incoming.is_none());
    let numbers = whole.filter_map(|member| member.key.path.file_name().rsplit('-').next()?.parse().ok());
    let mut numbers: Vec<usize> = numbers.collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn increments_are_made_while_others_are_deleted() {
    const COUNT: usize = 16;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("s");
    for directory in ["snapshots/2/7", "checkpoints/2/7"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    init(&root, StoreKind::Cloudstack);
    let done = AtomicBool::new(false);
    let (mut deleted, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..COUNT {
                let new = Increment { root: root.clone(), number };
                new.written();
                let parent = number.checked_sub(1).map(named);
                if let Some(parent) = &parent {
                    new.based(parent);
                }
                let made = stamp(&new.image());
                new.noted(parent.as_deref());
                assert_eq!(made.0, fs::metadata(new.image()).unwrap().ino(), "{number} was replaced");
            }
            done.store(true, Ordering::Relaxed);
        });
        loop {
            let last = done.load(Ordering::Relaxed);
            // Neither the first nor the newest, whose child may just be written.
            let mut numbers = ready(&root);
            numbers.pop();
            if let Some(number) = numbers.get(1 + deleted % 2) {
                let name = format!("snapshots/2/7/{}", named(*number));
                let report = delete(&open(&root), &[&name], ModeChoice::Auto);
                let well = report.as_ref().is_ok_and(|report| report.first_failure().is_none());
                deleted += usize::from(well);
                // Nobody is in the way any more.
                failed += usize::from(!well && last);
                assert!(failed < 3, "{report:?}");
            } else if last {
                break;
            }
        }
    });
    assert!(deleted > COUNT / 2, "{deleted}");
    assert!(files(&root.join(".qchain/intents")).is_empty() && files(&root.join(".qchain/tmp")).is_empty());
    // Each increment wrote one block, and all the increments before it are seen through it.
    let left = ready(&root);
    assert_eq!((left.first(), left.last()), (Some(&0), Some(&(COUNT - 1))));
    for number in left {
        let mut view = vec![0; MIB];
        for (number, block) in view.chunks_mut(MIB / 16).enumerate().take(number + 1) {
            block.fill(u8::try_from(number + 1).unwrap());
        }
        let truth = folder.path().join("truth");
        fs::write(&truth, view).unwrap();
        let image = Increment { root: root.clone(), number }.image();
        assert_true(&image, &truth, &format!("{number}"));
    }
}
