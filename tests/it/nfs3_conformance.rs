//! An export without a mount is what the directory is: the conformance suite, also where one store writes and the
//! other reads.

use std::any::Any;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use qchain::backend::nfs3::Nfs3Store;
use qchain::backend::posix::PosixStore;
use qchain::backend::{
    Backend, BackendError, Capabilities, DirEntry, FileKind, Identity, ImageLocks, LockKind, Means, Move,
    Moved, Result, Space, Stat, StoreFile, WalkEntry, conformance,
};
use qchain::ids::StorePath;

use super::support::nfs::Ganesha;
use super::support::qemu::{must, text};

/// A store that is written by one way and read by the other.
#[derive(Debug)]
struct Both {
    writer: PosixStore,
    reader: Nfs3Store,
}

#[derive(Debug)]
struct BothFile {
    writer: Arc<dyn StoreFile>,
    reader: Arc<dyn StoreFile>,
}

impl Both {
    fn file(&self, writer: Arc<dyn StoreFile>) -> Result<Arc<dyn StoreFile>> {
        let reader = self.reader.open(writer.path())?;
        // What came with the look-up is of now.
        reader.stat()?;
        Ok(Arc::new(BothFile { writer, reader }))
    }
}

impl Backend for Both {
    fn describe(&self) -> String {
        self.reader.describe()
    }
    fn open(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        let reader = self.reader.open(path)?;
        Ok(Arc::new(BothFile { writer: self.writer.open(path)?, reader }))
    }
    fn open_writable(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.file(self.writer.open_writable(path)?)
    }
    fn create(&self, path: &StorePath) -> Result<Arc<dyn StoreFile>> {
        self.file(self.writer.create(path)?)
    }
    fn stat(&self, path: &StorePath) -> Result<Stat> {
        self.reader.stat(path)
    }
    fn read_dir(&self, path: &StorePath) -> Result<Vec<DirEntry>> {
        self.reader.read_dir(path)
    }
    fn walk(
        &self,
        path: &StorePath,
        depth: usize,
        skip: &dyn Fn(&StorePath) -> bool,
    ) -> Vec<Result<WalkEntry>> {
        self.reader.walk(path, depth, skip)
    }
    fn create_dir(&self, path: &StorePath, private: bool) -> Result<()> {
        self.writer.create_dir(path, private)
    }
    fn remove_file(&self, path: &StorePath) -> Result<()> {
        self.writer.remove_file(path)
    }
    fn remove_dir(&self, path: &StorePath) -> Result<()> {
        self.writer.remove_dir(path)
    }
    fn rename(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.writer.rename(from, to)
    }
    fn exchange(&self, a: &StorePath, b: &StorePath) -> Result<()> {
        self.writer.exchange(a, b)
    }
    fn hard_link(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.writer.hard_link(from, to)
    }
    fn sync_dir(&self, path: &StorePath) -> Result<()> {
        self.writer.sync_dir(path)
    }
    fn space(&self) -> Result<Space> {
        self.reader.space()
    }
    fn try_lock(&self, path: &StorePath, kind: LockKind) -> Result<Option<Box<dyn Send + Sync>>> {
        self.writer.try_lock(path, kind)
    }
    fn local_path(&self, path: &StorePath) -> Option<PathBuf> {
        self.reader.local_path(path)
    }
    fn probe(&self, scratch: &StorePath) -> Result<Capabilities> {
        // Locks are not part of what is read.
        Ok(Capabilities { byte_range_locks: false, ..self.writer.probe(scratch)? })
    }
}

impl StoreFile for BothFile {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn path(&self) -> &StorePath {
        self.reader.path()
    }
    fn stat(&self) -> Result<Stat> {
        self.reader.stat()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.reader.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.writer.write_at(offset, data)
    }
    fn set_length(&self, length: u64) -> Result<()> {
        self.writer.set_length(length)
    }
    fn reserve(&self, offset: u64, length: u64) -> Result<bool> {
        // What does not fit takes all there is until the file goes, and the server keeps it open for a while.
        if length > 1 << 30 {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(BackendError::NoSpace { path: self.path().to_string(), source });
        }
        self.writer.reserve(offset, length)
    }
    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        self.writer.punch(offset, length)
    }
    fn move_runs(&self, sources: &[Arc<dyn StoreFile>], runs: &[Move], means: Means) -> Result<Moved> {
        let own = |file: &Arc<dyn StoreFile>| match file.as_any().downcast_ref::<Self>() {
            Some(both) => both.writer.clone(),
            None => file.clone(),
        };
        self.writer.move_runs(&sources.iter().map(own).collect::<Vec<_>>(), runs, means)
    }
    fn sync(&self) -> Result<()> {
        self.writer.sync()
    }
    fn drop_cache(&self) -> Result<()> {
        self.reader.drop_cache()
    }
    fn identity(&self) -> Result<Identity> {
        // What the protocol can tell must be right.
        let (told, whole) = (self.reader.identity()?, self.writer.identity()?);
        assert_eq!((told.uid, told.gid, told.mode), (whole.uid, whole.gid, whole.mode));
        Ok(whole)
    }
    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.writer.set_identity(identity)
    }
    fn image_locks(&self) -> Result<ImageLocks> {
        self.reader.image_locks()
    }
    fn hold_image_locks(&self) -> Result<Option<Box<dyn Send + Sync>>> {
        self.reader.hold_image_locks()
    }
}

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

#[test]
fn what_one_store_writes_the_other_reads() {
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    for more in ["", "&connections=2"] {
        let both = Both { writer: PosixStore::open(root.path()).unwrap(), reader: server.open(more) };
        let backend: Arc<dyn Backend> = Arc::new(both);
        let failed = conformance::check(&backend);
        // The protocol knows no open files: what loses its last name may be gone, unless the server still has it.
        for (case, why) in failed {
            assert_eq!(case, "removed-files-stay-open", "{why}");
            assert!(why.contains("removed or replaced on the server"), "{why}");
        }
        for left in fs::read_dir(root.path()).unwrap() {
            fs::remove_dir_all(left.unwrap().path()).unwrap();
        }
    }
}

/// The protocol knows no open files: what loses its last name may be gone for whoever has it open. Nothing else is
/// different from a mount.
#[test]
fn an_export_conforms() {
    let root = tempfile::tempdir().unwrap();
    let server = Ganesha::start(root.path());
    for more in ["", "&connections=2"] {
        let backend: Arc<dyn Backend> = Arc::new(server.open(more));
        for (case, why) in conformance::check(&backend) {
            assert!(["removed-files-stay-open", "replace-keeps-identity"].contains(&case), "{case}: {why}");
            assert!(why.contains("removed or replaced on the server"), "{case}: {why}");
        }
        let found = backend.probe(&StorePath::root()).unwrap();
        assert!(found.hard_links && found.network && !found.clone && !found.byte_range_locks, "{found:?}");
        assert!(!found.rename_exchange && !found.direct_io && !backend.read_only(), "{found:?}");
        for left in fs::read_dir(root.path()).unwrap() {
            fs::remove_dir_all(left.unwrap().path()).unwrap();
        }
    }
}

/// Also through links on the way, which the server's own look-up would not follow, but a path's would.
#[test]
fn links_pipes_and_sockets_are_what_they_are() {
    let root = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("d/a"), "a").unwrap();
    symlink(outside.path(), root.path().join("out")).unwrap();
    symlink("d", root.path().join("in")).unwrap();
    symlink("d/a", root.path().join("link")).unwrap();
    symlink("nowhere", root.path().join("dangling")).unwrap();
    must("mkfifo", &[text(&root.path().join("pipe"))]);
    let _socket = UnixListener::bind(root.path().join("socket")).unwrap();
    let server = Ganesha::start(root.path());
    let store = server.open("");
    for name in ["out", "in", "link", "dangling", "pipe", "socket", "out/secret", "in/a"] {
        let error = store.open(&path(name)).unwrap_err();
        assert!(matches!(error, BackendError::NotPlain { .. }), "{name}: {error}");
    }
    for (name, kind) in [
        ("out", FileKind::Symlink),
        ("dangling", FileKind::Symlink),
        ("pipe", FileKind::Special),
        ("socket", FileKind::Special),
        ("d", FileKind::Directory),
        ("d/a", FileKind::File),
    ] {
        assert_eq!(store.stat(&path(name)).unwrap().kind, kind, "{name}");
    }
    let walked = |store: &dyn Backend| -> Vec<_> {
        let entries = store.walk(&StorePath::root(), 9, &|_| false).into_iter();
        entries.map(|entry| entry.map(|entry| (entry.path.unwrap(), entry.kind)).unwrap()).collect()
    };
    assert_eq!(walked(&store), walked(&PosixStore::open(root.path()).unwrap()));
    assert!(matches!(store.read_dir(&path("in")).unwrap_err(), BackendError::NotPlain { .. }));
    // By component as well: a pipe in the way is no directory.
    assert!(matches!(store.stat(&path("pipe/x")).unwrap_err(), BackendError::NotFound { .. }));
}

#[test]
fn a_directory_of_many_pages_is_listed_whole() {
    let root = tempfile::tempdir().unwrap();
    let mut wanted: Vec<String> = (0..6000).map(|index| format!("{index:05}-{}", "n".repeat(150))).collect();
    for name in &wanted {
        fs::write(root.path().join(name), "").unwrap();
    }
    fs::write(root.path().join(OsStr::from_bytes(b"not \xff UTF-8")), "").unwrap();
    fs::write(root.path().join("control\n"), "").unwrap();
    let server = Ganesha::start(root.path());
    let store = server.open("");
    let mut names = Vec::new();
    let mut bad = Vec::new();
    for entry in store.read_dir(&StorePath::root()).unwrap() {
        match entry.name {
            Ok(name) => names.push(name),
            Err(lossy) => bad.push(lossy),
        }
    }
    names.sort();
    bad.sort();
    wanted.sort();
    assert!(names == wanted, "{} names", names.len());
    assert_eq!(bad, ["control\n", "not \u{fffd} UTF-8"]);
    let walked = store.walk(&StorePath::root(), 1, &|_| false);
    assert_eq!(walked.iter().filter(|entry| entry.as_ref().unwrap().path.is_err()).count(), 2);
}

#[test]
fn bytes_come_from_where_they_are() {
    let root = tempfile::tempdir().unwrap();
    let length = 40_000_000 + 123_u64;
    let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    fs::write(root.path().join("a"), &bytes).unwrap();
    let sparse = fs::File::create(root.path().join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    sparse.write_all_at(b"far", 1 << 39).unwrap();
    let server = Ganesha::start(root.path());
    let store = server.open("");
    let file = store.open(&path("a")).unwrap();
    for (offset, count) in [
        (0, 1),
        (0, 40_000_123),
        (5, 1 << 20),
        ((1 << 20) - 1, (1 << 20) + 2),
        (7_777_777, 25_000_000),
        (length - 10, 1000),
        (length - (8 << 20), 9 << 20),
        (length, 10),
        (length + 5_000_000, 3 << 20),
        (u64::MAX - 3, 100),
    ] {
        let mut buffer = vec![0xEE; count];
        let from = usize::try_from(offset.min(length)).unwrap();
        let there = &bytes[from..bytes.len().min(from + count)];
        match file.read_at(offset, &mut buffer) {
            Ok(read) => assert!(read == there.len() && buffer[..read] == *there, "{offset} {count}: {read}"),
            // Where files end the server may say so.
            Err(error) => assert!(offset > i64::MAX.cast_unsigned(), "{offset}: {error}"),
        }
    }
    let far = store.open(&path("sparse")).unwrap();
    let mut buffer = [1; 8];
    assert_eq!(far.read_at((1 << 39) - 2, &mut buffer).unwrap(), 8);
    assert_eq!(&buffer, b"\0\0far\0\0\0");
    let stat = far.stat().unwrap();
    assert!(stat.length == 1 << 40 && stat.allocated_bytes < 1 << 20, "{stat:?}");
    assert_eq!(
        stat.allocated_bytes,
        PosixStore::open(root.path()).unwrap().stat(&path("sparse")).unwrap().allocated_bytes
    );
}

#[test]
fn a_file_of_the_same_name_is_not_the_file_that_was_opened() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("d/a"), "old").unwrap();
    let server = Ganesha::start(root.path());
    let store = server.open("");
    let old = store.open(&path("d/a")).unwrap();
    fs::write(root.path().join("new"), "new").unwrap();
    fs::rename(root.path().join("new"), root.path().join("d/a")).unwrap();
    let mut buffer = [0; 3];
    match old.read_at(0, &mut buffer) {
        Ok(_) => assert_eq!(&buffer, b"old", "the server has it open"),
        Err(error) => assert!(matches!(error, BackendError::Io { .. }), "{error}"),
    }
    assert_eq!(store.open(&path("d/a")).unwrap().read_at(0, &mut buffer).unwrap(), 3);
    assert_eq!(&buffer, b"new");
    // A directory that is another one by now: its handle is known to the client, and not to the server, which tells
    // changes by times that stand still for some milliseconds.
    let moment = std::time::Duration::from_millis(50);
    std::thread::sleep(moment);
    fs::rename(root.path().join("d"), root.path().join("gone")).unwrap();
    fs::remove_dir_all(root.path().join("gone")).unwrap();
    assert!(matches!(store.stat(&path("d/a")).unwrap_err(), BackendError::NotFound { .. }));
    std::thread::sleep(moment);
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("d/b"), "b").unwrap();
    assert_eq!(store.stat(&path("d/b")).unwrap().length, 1);
    assert_eq!(store.read_dir(&path("d")).unwrap().len(), 1);
}

#[test]
fn users_are_who_the_url_says() {
    let root = tempfile::tempdir().unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(root.path().join("a"), "a").unwrap();
    fs::set_permissions(root.path().join("a"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::set_permissions(root.path().join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    let server = Ganesha::start(root.path());
    let mut buffer = [0; 1];
    assert_eq!(server.open("").open(&path("a")).unwrap().read_at(0, &mut buffer).unwrap(), 1);
    let other = server.open("&uid=1000&gid=1000");
    let denied = [
        other.open(&path("a")).and_then(|file| file.read_at(0, &mut buffer)).map(drop),
        other.read_dir(&path("d")).map(drop),
        other.stat(&path("d/x")).map(drop),
    ];
    for outcome in denied {
        let error = outcome.unwrap_err();
        assert!(error.is_denied(), "{error}");
    }
}
