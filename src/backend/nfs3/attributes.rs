//! Owner, mode and length: all that the protocol lets a client give a file.
//!
//! Extended attributes, and with them ACLs, are not part of NFSv3: a file that is read has none, and one that is wanted
//! cannot be given. What a server did is read back, as one that squashes us may say that it did it.

use nfs3_client::nfs3_types::nfs3::{
    NFS_PROGRAM, Nfs3Option, SETATTR3args, SETATTR3resfail, SETATTR3resok, fattr3, nfs_fh3, nfsstat3, sattr3,
};

use super::effort::Tried;
use super::fault::{Fault, Result};
use super::pool::Pool;
use super::resolve::stat_of;
use crate::backend::{Identity, Stat};

/// Sets what is set of `wanted`. Gives what the file is afterwards, if the server tells.
///
/// A try whose answer was lost is made again as it is: twice is as good as once.
pub(super) async fn set(pool: &Pool, handle: &nfs_fh3, wanted: &sattr3) -> Result<Option<Stat>> {
    let args =
        SETATTR3args { object: handle.clone(), new_attributes: wanted.clone(), guard: Nfs3Option::None };
    let mut effort = pool.effort()?;
    loop {
        match effort.call::<_, SETATTR3resok, SETATTR3resfail>(NFS_PROGRAM::NFSPROC3_SETATTR, &args).await? {
            Tried::Done(reply) => return Ok(told(&reply.obj_wcc.after)),
            Tried::Refused(status) => return Err(Fault::Status(status)),
            Tried::Lost => {}
        }
    }
}

/// What a reply says of the file, if it does.
pub(super) fn told(after: &Nfs3Option<fattr3>) -> Option<Stat> {
    match after {
        Nfs3Option::Some(attributes) => Some(stat_of(attributes)),
        Nfs3Option::None => None,
    }
}

/// Permission bits alone.
pub(super) fn mode(bits: u32) -> sattr3 {
    sattr3 { mode: Nfs3Option::Some(bits), ..sattr3::default() }
}

/// A length alone, in bytes.
pub(super) fn length(bytes: u64) -> sattr3 {
    sattr3 { size: Nfs3Option::Some(bytes), ..sattr3::default() }
}

/// What has to be set so that a file which is `is` gets that owner and group; `None` if it has them.
pub(super) fn owner(is: &Stat, wanted: &Identity) -> Option<sattr3> {
    let changed =
        |is: u32, wanted: u32| if is == wanted { Nfs3Option::None } else { Nfs3Option::Some(wanted) };
    let (uid, gid) = (changed(is.uid, wanted.uid), changed(is.gid, wanted.gid));
    let same = uid.is_none() && gid.is_none();
    (!same).then(|| sattr3 { uid, gid, ..sattr3::default() })
}

/// Whether that is the server's policy, rather than a failure.
pub(super) fn is_policy(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::Status(
            nfsstat3::NFS3ERR_PERM
                | nfsstat3::NFS3ERR_ACCES
                | nfsstat3::NFS3ERR_NOTSUPP
                | nfsstat3::NFS3ERR_INVAL
        )
    )
}
