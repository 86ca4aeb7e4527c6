//! What the server in this process has: files, directories and links, in memory.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::SystemTime;
use std::{fs, io};

use nfs3_types::nfs3::{Nfs3Option, fattr3, ftype3, nfs_fh3, nfsstat3, nfstime3, sattr3, specdata3};
use nfs3_types::xdr_codec::Opaque;

/// The root's id.
pub const ROOT: u64 = 1;
/// The most bytes of a file that are kept, and where one ends at last.
const MOST_BYTES: u64 = 1 << 30;
const LAST_BYTE: u64 = i64::MAX.cast_unsigned();

type Result<T> = std::result::Result<T, nfsstat3>;

/// What a name stands for.
#[derive(Clone, Debug)]
pub enum Body {
    /// Its bytes, and its length: what lies between is a hole.
    File(Vec<u8>, u64),
    Directory(BTreeMap<Vec<u8>, u64>),
    Link,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Node {
    pub body: Body,
    mode: u32,
    owner: (u32, u32),
    links: u32,
    changed: SystemTime,
    /// What an exclusive CREATE came with.
    pub verifier: [u8; 8],
}

/// All of them, by their ids.
#[derive(Debug)]
pub struct Tree {
    nodes: HashMap<u64, Node>,
    next: u64,
    /// What files had when they were made durable.
    durable: HashMap<u64, Vec<u8>>,
}

impl Default for Tree {
    fn default() -> Self {
        let root = Node::new(Body::Directory(BTreeMap::new()), 0o755);
        Self { nodes: HashMap::from([(ROOT, root)]), next: ROOT + 1, durable: HashMap::new() }
    }
}

impl Body {
    pub fn file(bytes: Vec<u8>) -> Self {
        let length = bytes.len() as u64;
        Self::File(bytes, length)
    }
}

impl Node {
    fn new(body: Body, mode: u32) -> Self {
        Self { body, mode, owner: (0, 0), links: 1, changed: SystemTime::now(), verifier: [0; 8] }
    }
}

pub fn handle(id: u64) -> nfs_fh3 {
    nfs_fh3 { data: Opaque::owned(id.to_be_bytes().to_vec()) }
}

impl Tree {
    /// A copy of a directory, without what is neither file, directory nor link.
    pub fn of(directory: &Path) -> Self {
        let mut tree = Self::default();
        let mut waiting = vec![(directory.to_owned(), ROOT)];
        while let Some((place, id)) = waiting.pop() {
            for entry in fs::read_dir(&place).unwrap() {
                let entry = entry.unwrap();
                let (path, kind) = (entry.path(), entry.file_type().unwrap());
                let body = if kind.is_dir() {
                    Body::Directory(BTreeMap::new())
                } else if kind.is_symlink() {
                    Body::Link
                } else if kind.is_file() {
                    Body::file(fs::read(&path).unwrap())
                } else {
                    continue;
                };
                let name = entry.file_name().into_encoded_bytes();
                let made = tree.make(id, &name, body, if kind.is_dir() { 0o755 } else { 0o644 }).unwrap();
                if kind.is_dir() {
                    waiting.push((path, made));
                }
            }
        }
        tree
    }

    /// Makes the files and directories in a directory of the file system, which must be empty.
    pub fn write_to(&self, place: &Path) -> io::Result<()> {
        self.write_below(ROOT, place)
    }

    fn write_below(&self, id: u64, place: &Path) -> io::Result<()> {
        fs::create_dir_all(place)?;
        let Body::Directory(names) = &self.nodes[&id].body else { unreachable!("{id} is no directory") };
        for (name, id) in names {
            let path = place.join(str::from_utf8(name).unwrap());
            match &self.nodes[id].body {
                Body::File(bytes, length) => {
                    fs::write(&path, bytes)?;
                    fs::File::options().write(true).open(path)?.set_len(*length)?;
                }
                Body::Directory(_) => self.write_below(*id, &path)?,
                Body::Link => {}
            }
        }
        Ok(())
    }

    /// What a handle stands for.
    pub fn id(&self, handle: &nfs_fh3) -> Result<u64> {
        let bytes = handle.data.as_ref().try_into().map_err(|_| nfsstat3::NFS3ERR_BADHANDLE)?;
        let id = u64::from_be_bytes(bytes);
        if self.nodes.contains_key(&id) { Ok(id) } else { Err(nfsstat3::NFS3ERR_STALE) }
    }

    pub fn node(&mut self, id: u64) -> Result<&mut Node> {
        self.nodes.get_mut(&id).ok_or(nfsstat3::NFS3ERR_STALE)
    }

    pub fn names(&mut self, id: u64) -> Result<&mut BTreeMap<Vec<u8>, u64>> {
        match &mut self.node(id)?.body {
            Body::Directory(names) => Ok(names),
            Body::File(..) | Body::Link => Err(nfsstat3::NFS3ERR_NOTDIR),
        }
    }

    pub fn file(&mut self, id: u64) -> Result<(&mut Vec<u8>, &mut u64)> {
        match &mut self.node(id)?.body {
            Body::File(bytes, length) => Ok((bytes, length)),
            Body::Directory(_) => Err(nfsstat3::NFS3ERR_ISDIR),
            Body::Link => Err(nfsstat3::NFS3ERR_INVAL),
        }
    }

    pub fn look_up(&mut self, directory: u64, name: &[u8]) -> Result<u64> {
        self.names(directory)?.get(name).copied().ok_or(nfsstat3::NFS3ERR_NOENT)
    }

    /// What a path leads to.
    pub fn find(&mut self, path: &str) -> Result<u64> {
        path.split('/').try_fold(ROOT, |at, name| self.look_up(at, name.as_bytes()))
    }

    pub fn make(&mut self, directory: u64, name: &[u8], body: Body, mode: u32) -> Result<u64> {
        if self.names(directory)?.contains_key(name) {
            return Err(nfsstat3::NFS3ERR_EXIST);
        }
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, Node::new(body, mode));
        self.names(directory)?.insert(name.to_vec(), id);
        self.touch(directory)?;
        Ok(id)
    }

    pub fn link(&mut self, id: u64, directory: u64, name: &[u8]) -> Result<()> {
        if self.names(directory)?.contains_key(name) {
            return Err(nfsstat3::NFS3ERR_EXIST);
        }
        self.names(directory)?.insert(name.to_vec(), id);
        self.node(id)?.links += 1;
        self.touch(directory)
    }

    pub fn remove(&mut self, directory: u64, name: &[u8], of_directory: bool) -> Result<()> {
        let id = self.look_up(directory, name)?;
        match &self.node(id)?.body {
            Body::Directory(_) if !of_directory => return Err(nfsstat3::NFS3ERR_ISDIR),
            Body::Directory(names) if !names.is_empty() => return Err(nfsstat3::NFS3ERR_NOTEMPTY),
            Body::File(..) | Body::Link if of_directory => return Err(nfsstat3::NFS3ERR_NOTDIR),
            _ => {}
        }
        self.names(directory)?.remove(name);
        let node = self.node(id)?;
        node.links -= 1;
        if node.links == 0 {
            self.nodes.remove(&id);
        }
        self.touch(directory)
    }

    pub fn rename(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) -> Result<()> {
        let id = self.look_up(from.0, from.1)?;
        match self.look_up(to.0, to.1) {
            Ok(target) if target == id => return Ok(()),
            Ok(_) => {
                let of_directory = matches!(self.node(id)?.body, Body::Directory(_));
                self.remove(to.0, to.1, of_directory)?;
            }
            Err(_) => {}
        }
        self.names(from.0)?.remove(from.1);
        self.names(to.0)?.insert(to.1.to_vec(), id);
        self.touch(from.0)?;
        self.touch(to.0)
    }

    pub fn set(&mut self, id: u64, wanted: &sattr3) -> Result<()> {
        if let Nfs3Option::Some(size) = wanted.size {
            if size > LAST_BYTE {
                return Err(nfsstat3::NFS3ERR_FBIG);
            }
            let most = usize::try_from(size).unwrap();
            let (bytes, length) = self.file(id)?;
            bytes.truncate(most);
            *length = size;
            self.durable.entry(id).or_default().truncate(most);
        }
        let node = self.node(id)?;
        for (wanted, place) in [
            (&wanted.mode, &mut node.mode),
            (&wanted.uid, &mut node.owner.0),
            (&wanted.gid, &mut node.owner.1),
        ] {
            if let Nfs3Option::Some(value) = wanted {
                *place = *value;
            }
        }
        self.touch(id)
    }

    /// At most `count` bytes from an offset on, and whether the file ends behind them.
    pub fn read(&mut self, id: u64, offset: u64, count: usize) -> Result<(Vec<u8>, bool)> {
        let (bytes, length) = self.file(id)?;
        let left = usize::try_from(length.saturating_sub(offset)).unwrap();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let mut data = bytes[from..bytes.len().min(from.saturating_add(count))].to_vec();
        data.resize(count.min(left), 0);
        Ok((data, count >= left))
    }

    pub fn write(&mut self, id: u64, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= MOST_BYTES);
        let end = usize::try_from(end.ok_or(nfsstat3::NFS3ERR_FBIG)?).unwrap();
        let (bytes, length) = self.file(id)?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        *length = (*length).max(end as u64);
        bytes[end - data.len()..end].copy_from_slice(data);
        self.touch(id)
    }

    /// What a file has is durable now.
    pub fn keep(&mut self, id: u64) -> Result<()> {
        let bytes = self.file(id)?.0.clone();
        self.durable.insert(id, bytes);
        Ok(())
    }

    /// A file has what was durable, and zeros for the rest.
    pub fn lose(&mut self, id: u64) -> Result<()> {
        let durable = self.durable.get(&id).cloned().unwrap_or_default();
        let (bytes, _) = self.file(id)?;
        bytes.fill(0);
        bytes.iter_mut().zip(durable).for_each(|(byte, was)| *byte = was);
        Ok(())
    }

    fn touch(&mut self, id: u64) -> Result<()> {
        self.node(id)?.changed = SystemTime::now();
        Ok(())
    }

    pub fn attributes(&mut self, id: u64) -> Result<fattr3> {
        let node = self.node(id)?;
        let (type_, size, used) = match &node.body {
            Body::File(bytes, length) => (ftype3::NF3REG, *length, bytes.len() as u64),
            Body::Directory(_) => (ftype3::NF3DIR, 4096, 4096),
            Body::Link => (ftype3::NF3LNK, 1, 0),
        };
        let changed = nfstime3::try_from(node.changed).unwrap();
        Ok(fattr3 {
            type_,
            mode: node.mode,
            nlink: node.links,
            uid: node.owner.0,
            gid: node.owner.1,
            size,
            used: used.next_multiple_of(512),
            rdev: specdata3 { specdata1: 0, specdata2: 0 },
            fsid: 7,
            fileid: id,
            atime: changed,
            mtime: changed,
            ctime: changed,
        })
    }
}
