//! The calls of the protocol, as RFC 1813 has them.

use std::collections::BTreeMap;
use std::io::Cursor;

use nfs3_types::mount::{self, fhandle3, mountres3, mountres3_ok};
use nfs3_types::nfs3::{
    ACCESS3args, ACCESS3resok, COMMIT3args, COMMIT3resok, CREATE3args, CREATE3resok, FSF3_LINK, FSINFO3resok,
    FSSTAT3resok, GETATTR3args, GETATTR3resok, LINK3args, LINK3resok, LOOKUP3args, LOOKUP3resok, MKDIR3args,
    Nfs3Option, PATHCONF3resok, READ3args, READ3resok, READDIR3args, READDIR3resok, READDIRPLUS3args,
    READDIRPLUS3resok, REMOVE3args, REMOVE3resok, RENAME3args, RENAME3resok, SETATTR3args, SETATTR3resok,
    WRITE3args, WRITE3resok, cookieverf3, createhow3, dirlist3, dirlistplus3, diropargs3, entry3, entryplus3,
    fattr3, ftype3, nfs_fh3, nfsstat3, nfstime3, sattr3, stable_how, wcc_data, writeverf3,
};
use nfs3_types::rpc::{accept_stat_data, accepted_reply, msg_body, opaque_auth, reply_body, rpc_msg};
use nfs3_types::xdr_codec::{List, Opaque, Pack, Unpack};

use super::super::proxy::left_out;
use super::tree::{Body, ROOT, Tree, handle};
use super::{Fate, Manner, Page, Shared, lock};

type Result<T> = std::result::Result<T, nfsstat3>;

fn packed(value: &impl Pack) -> Vec<u8> {
    let mut bytes = Vec::new();
    value.pack(&mut bytes).unwrap();
    bytes
}

/// The arguments of a call.
fn args<T: Unpack>(input: &mut Cursor<&[u8]>) -> Result<T> {
    T::unpack(input).map(|(args, _)| args).map_err(|_| nfsstat3::NFS3ERR_INVAL)
}

/// The record of the reply to a call.
pub fn answer(shared: &Shared, call: &[u8]) -> Vec<u8> {
    let mut input = Cursor::new(call);
    let (message, _) = rpc_msg::unpack(&mut input).unwrap();
    let msg_body::CALL(body) = message.body else { panic!("no call") };
    let (reply, fate) = if body.prog == mount::PROGRAM {
        let fhandle = fhandle3(Opaque::owned(handle(ROOT).data.to_vec()));
        (packed(&mountres3::Ok(mountres3_ok { fhandle, auth_flavors: vec![1] })), Fate::Pass)
    } else {
        numbered(shared, body.proc, &mut input)
    };
    let reply_data = accept_stat_data::SUCCESS;
    let accepted = reply_body::MSG_ACCEPTED(accepted_reply { verf: opaque_auth::default(), reply_data });
    let mut inner = packed(&rpc_msg { xid: message.xid, body: msg_body::REPLY(accepted) });
    inner.extend(reply);
    let head = (1_u32 << 31) + u32::try_from(inner.len()).unwrap();
    let record = [&head.to_be_bytes()[..], &inner].concat();
    if let Fate::Change(change) = fate { change(record) } else { record }
}

fn numbered(shared: &Shared, procedure: u32, input: &mut Cursor<&[u8]>) -> (Vec<u8>, Fate) {
    let number = {
        let mut calls = lock(&shared.calls);
        calls.push(procedure);
        calls.iter().filter(|call| **call == procedure).count() - 1
    };
    let fate = lock(&shared.choose).as_ref().map_or(Fate::Pass, |choose| choose(procedure, number));
    let fate = match fate {
        Fate::Late(before) => {
            before();
            Fate::Pass
        }
        fate => fate,
    };
    let done = match fate {
        Fate::Answer(status) => Err(status),
        Fate::Pass | Fate::Late(_) | Fate::Change(_) => {
            let (mut tree, mut manner) = (lock(&shared.tree), lock(&shared.manner));
            let mut server =
                Server { tree: &mut tree, manner: &mut manner, verifier: &mut lock(&shared.verifier) };
            server.call(procedure, input)
        }
    };
    let reply = match done {
        Ok(reply) if procedure == 0 => reply,
        Ok(reply) => [packed(&nfsstat3::NFS3_OK), reply].concat(),
        Err(status) => [packed(&status), vec![0; 4 * left_out(procedure)]].concat(),
    };
    (reply, fate)
}

/// A server during one call.
struct Server<'s> {
    tree: &'s mut Tree,
    manner: &'s mut Manner,
    verifier: &'s mut u64,
}

impl Server<'_> {
    fn call(&mut self, procedure: u32, input: &mut Cursor<&[u8]>) -> Result<Vec<u8>> {
        match procedure {
            0 => Ok(Vec::new()),
            1 => {
                let id = self.id::<GETATTR3args>(input, |args| &args.object)?;
                Ok(packed(&GETATTR3resok { obj_attributes: self.attributes(id)? }))
            }
            2 => {
                let args: SETATTR3args = args(input)?;
                let id = self.tree.id(&args.object)?;
                self.tree.set(id, &args.new_attributes)?;
                Ok(packed(&SETATTR3resok { obj_wcc: self.around(id) }))
            }
            3 => {
                let what = args::<LOOKUP3args>(input)?.what;
                let (directory, name) = self.place(&what)?;
                let id = self.tree.look_up(directory, name)?;
                let (obj_attributes, dir_attributes) = (self.told(id), self.told(directory));
                Ok(packed(&LOOKUP3resok { object: handle(id), obj_attributes, dir_attributes }))
            }
            4 => {
                let args: ACCESS3args = args(input)?;
                let id = self.tree.id(&args.object)?;
                let obj_attributes = self.told(id);
                Ok(packed(&ACCESS3resok { obj_attributes, access: args.access }))
            }
            6 => self.read(&args(input)?),
            7 => self.write(&args(input)?),
            8 => self.create(&args(input)?),
            9 => {
                let args: MKDIR3args = args(input)?;
                let (directory, name) = self.place(&args.where_)?;
                let id = self.tree.make(directory, name, Body::Directory(BTreeMap::new()), 0)?;
                self.tree.set(id, &args.attributes)?;
                Ok(self.made(id, directory))
            }
            12 | 13 => {
                let object = args::<REMOVE3args>(input)?.object;
                let (directory, name) = self.place(&object)?;
                self.tree.remove(directory, name, procedure == 13)?;
                Ok(packed(&REMOVE3resok { dir_wcc: self.around(directory) }))
            }
            14 => {
                let args: RENAME3args = args(input)?;
                let (from, to) = (self.place(&args.from)?, self.place(&args.to)?);
                self.tree.rename(from, to)?;
                let (fromdir_wcc, todir_wcc) = (self.around(from.0), self.around(to.0));
                Ok(packed(&RENAME3resok { fromdir_wcc, todir_wcc }))
            }
            15 => {
                let args: LINK3args = args(input)?;
                let (id, (directory, name)) = (self.tree.id(&args.file)?, self.place(&args.link)?);
                self.tree.link(id, directory, name)?;
                let (file_attributes, linkdir_wcc) = (self.told(id), self.around(directory));
                Ok(packed(&LINK3resok { file_attributes, linkdir_wcc }))
            }
            16 => {
                let args: READDIR3args = args(input)?;
                self.list_plainly(&args)
            }
            17 if self.manner.plus => self.list(&args(input)?),
            18..=20 => {
                // FSSTAT, FSINFO and PATHCONF are asked of a handle alone.
                let id = self.id::<GETATTR3args>(input, |args| &args.object)?;
                Ok(self.limits(procedure, id))
            }
            21 => self.commit(&args(input)?),
            _ => Err(nfsstat3::NFS3ERR_NOTSUPP),
        }
    }

    fn id<T: Unpack>(&self, input: &mut Cursor<&[u8]>, of: impl Fn(&T) -> &nfs_fh3) -> Result<u64> {
        self.tree.id(of(&args(input)?))
    }

    /// A directory, and a name in it.
    fn place<'n>(&self, place: &'n diropargs3<'_>) -> Result<(u64, &'n [u8])> {
        Ok((self.tree.id(&place.dir)?, place.name.0.as_ref()))
    }

    fn attributes(&mut self, id: u64) -> Result<fattr3> {
        let mut attributes = self.tree.attributes(id)?;
        attributes.size = self.manner.length.unwrap_or(attributes.size);
        if self.manner.same_id {
            attributes.fileid = 5;
        }
        Ok(attributes)
    }

    /// What a reply may leave out.
    fn told(&mut self, id: u64) -> Nfs3Option<fattr3> {
        if self.manner.bare {
            return Nfs3Option::None;
        }
        self.attributes(id).map_or(Nfs3Option::None, Nfs3Option::Some)
    }

    fn around(&mut self, id: u64) -> wcc_data {
        wcc_data { before: Nfs3Option::None, after: self.told(id) }
    }

    fn read(&mut self, args: &READ3args) -> Result<Vec<u8>> {
        let id = self.tree.id(&args.file)?;
        let count = usize::try_from(args.count).unwrap().min(self.manner.most) + self.manner.more;
        let (data, eof) = self.tree.read(id, args.offset, count)?;
        let (file_attributes, count) = (self.told(id), u32::try_from(data.len()).unwrap());
        Ok(packed(&READ3resok { file_attributes, count, eof, data: Opaque::owned(data) }))
    }

    fn write(&mut self, args: &WRITE3args<'_>) -> Result<Vec<u8>> {
        let id = self.tree.id(&args.file)?;
        let data = args.data.as_ref();
        let count = data.len().min(self.manner.most);
        self.tree.write(id, args.offset, &data[..count])?;
        let count = u32::try_from(count + self.manner.more).unwrap();
        let verf = writeverf3(self.verifier.to_be_bytes());
        Ok(packed(&WRITE3resok { file_wcc: self.around(id), count, committed: stable_how::UNSTABLE, verf }))
    }

    fn commit(&mut self, args: &COMMIT3args) -> Result<Vec<u8>> {
        let id = self.tree.id(&args.file)?;
        if self.manner.losses > 0 {
            self.manner.losses -= 1;
            *self.verifier += 1;
            self.tree.lose(id)?;
        } else {
            self.tree.keep(id)?;
        }
        let verf = writeverf3(self.verifier.to_be_bytes());
        Ok(packed(&COMMIT3resok { file_wcc: self.around(id), verf }))
    }

    fn create(&mut self, args: &CREATE3args<'_>) -> Result<Vec<u8>> {
        let (directory, name) = self.place(&args.where_)?;
        let (verifier, wanted) = match &args.how {
            createhow3::EXCLUSIVE(_) if !self.manner.exclusive => return Err(nfsstat3::NFS3ERR_NOTSUPP),
            createhow3::EXCLUSIVE(verifier) => (verifier.0, sattr3::default()),
            createhow3::UNCHECKED(wanted) | createhow3::GUARDED(wanted) => ([0; 8], wanted.clone()),
        };
        let id = match self.tree.make(directory, name, Body::file(Vec::new()), 0) {
            Err(nfsstat3::NFS3ERR_EXIST) if verifier != [0; 8] => {
                let there = self.tree.look_up(directory, name)?;
                if self.tree.node(there)?.verifier != verifier {
                    return Err(nfsstat3::NFS3ERR_EXIST);
                }
                there
            }
            made => made?,
        };
        self.tree.node(id)?.verifier = verifier;
        self.tree.set(id, &wanted)?;
        Ok(self.made(id, directory))
    }

    fn made(&mut self, id: u64, directory: u64) -> Vec<u8> {
        let obj = if self.manner.bare { Nfs3Option::None } else { Nfs3Option::Some(handle(id)) };
        packed(&CREATE3resok { obj, obj_attributes: self.told(id), dir_wcc: self.around(directory) })
    }

    fn page(&self, names: &BTreeMap<Vec<u8>, u64>, cookie: u64, count: u32) -> Page {
        if let Some(pages) = &self.manner.pages {
            return pages(cookie);
        }
        // As many as fit, at 300 bytes for a name with all that is told of it.
        let most = usize::try_from(count / 300).unwrap().max(1);
        let all = names.keys().cloned().zip(1..).skip(usize::try_from(cookie).unwrap());
        let page: Vec<_> = all.take(most).collect();
        let last = page.last().map_or(cookie, |(_, cookie)| *cookie);
        (page, last == names.len() as u64)
    }

    fn list_plainly(&mut self, args: &READDIR3args) -> Result<Vec<u8>> {
        let directory = self.tree.id(&args.dir)?;
        let names = self.tree.names(directory)?.clone();
        let (page, eof) = self.page(&names, args.cookie, args.count);
        let entry = |(name, cookie): (Vec<u8>, u64)| entry3 { fileid: 1, name: name.into(), cookie };
        let reply = dirlist3 { entries: List(page.into_iter().map(entry).collect()), eof };
        let (dir_attributes, cookieverf) = (self.told(directory), cookieverf3([3; 8]));
        Ok(packed(&READDIR3resok { dir_attributes, cookieverf, reply }))
    }

    fn list(&mut self, args: &READDIRPLUS3args) -> Result<Vec<u8>> {
        let directory = self.tree.id(&args.dir)?;
        let names = self.tree.names(directory)?.clone();
        let (page, eof) = self.page(&names, args.cookie, args.maxcount);
        let mut entries = Vec::new();
        for (name, cookie) in page {
            let id = names.get(&name).copied().unwrap_or(u64::MAX);
            let known = !self.manner.bare && names.contains_key(&name);
            let name_handle = if known { Nfs3Option::Some(handle(id)) } else { Nfs3Option::None };
            // What is made up is a file.
            let made_up = !self.manner.bare && !names.contains_key(&name);
            let name_attributes = if made_up {
                let root = self.tree.attributes(ROOT)?;
                Nfs3Option::Some(fattr3 { type_: ftype3::NF3REG, ..root })
            } else {
                self.told(id)
            };
            entries.push(entryplus3 { fileid: id, name: name.into(), cookie, name_attributes, name_handle });
        }
        let (reply, cookieverf) = (dirlistplus3 { entries: List(entries), eof }, cookieverf3([3; 8]));
        Ok(packed(&READDIRPLUS3resok { dir_attributes: self.told(directory), cookieverf, reply }))
    }

    fn limits(&mut self, procedure: u32, id: u64) -> Vec<u8> {
        let obj_attributes = self.told(id);
        let (tbytes, files) = (1 << 40, 1 << 20);
        let ((rtmax, wtmax), links) = (self.manner.told, u32::from(self.manner.links));
        match procedure {
            18 => packed(&FSSTAT3resok {
                obj_attributes,
                tbytes,
                fbytes: tbytes,
                abytes: tbytes,
                tfiles: files,
                ffiles: files,
                afiles: files,
                invarsec: 0,
            }),
            19 => packed(&FSINFO3resok {
                obj_attributes,
                rtmax,
                rtpref: rtmax,
                rtmult: 1,
                wtmax,
                wtpref: wtmax,
                wtmult: 1,
                dtpref: 4096,
                maxfilesize: 1 << 40,
                time_delta: nfstime3 { seconds: 0, nseconds: 1 },
                properties: FSF3_LINK * links,
            }),
            _ => packed(&PATHCONF3resok {
                obj_attributes,
                linkmax: 1024,
                name_max: self.manner.name_max,
                no_trunc: true,
                chown_restricted: true,
                case_insensitive: false,
                case_preserving: true,
            }),
        }
    }
}
