//! From an export's name to the handle of its root: portmapper, then MNT.

use std::fmt::Display;
use std::io;

use nfs3_client::RpcError;
use nfs3_client::nfs3_types::mount::{self, MOUNT_PROGRAM, dirpath, mountstat3};
use nfs3_client::nfs3_types::nfs3::nfs_fh3;
use nfs3_client::nfs3_types::portmap::{self, IPPROTO_TCP, PMAP_PORT, PMAP_PROG, mapping};
use nfs3_client::nfs3_types::rpc::opaque_auth;
use nfs3_client::nfs3_types::xdr_codec::Opaque;
use nfs3_client::rpc::RpcClient;

use super::connection::{self, Rpc};
use super::fault::Broken;
use super::pool::Peer;
use super::url::NfsUrl;
use super::wire::Mounted;
use crate::backend::{BackendError, Result};

/// Mounts. Nothing is tried twice: at the beginning a wrong name or port is likelier than a server that is just
/// being restarted. Ends within the URL's time-out.
pub(super) async fn root(url: &NfsUrl, peer: &Peer) -> Result<nfs_fh3> {
    let silent = || unreachable(peer, format!("no answer within {} s", url.timeout.as_secs()));
    tokio::time::timeout(url.timeout, mount(url, peer)).await.map_err(|_| silent())?
}

async fn mount(url: &NfsUrl, peer: &Peer) -> Result<nfs_fh3> {
    let told = match url.mount_port {
        Some(port) => Some(port),
        None => port_of_mount(url, peer).await?,
    };
    // Servers without a portmapper may have the mount service where NFS is.
    let port = told.unwrap_or(url.port);
    let service = || format!("the mount service of {}, port {port},", url.host);
    let mut rpc = call_to(peer, port, peer.reserved, peer.credential.clone())
        .await
        .map_err(|error| unreachable(peer, format!("{} cannot be reached: {error}", service())))?;
    let path = dirpath(Opaque::borrowed(url.export.as_bytes()));
    let procedure = MOUNT_PROGRAM::MOUNTPROC3_MNT as u32;
    match rpc.call::<_, Mounted>(mount::PROGRAM, mount::VERSION, procedure, &path).await {
        Ok(Mounted::Root(root)) => Ok(root),
        Ok(Mounted::Refused(status)) => Err(refused(url, peer, status)),
        Err(RpcError::ProgUnavail) => {
            let why = if told.is_some() { "" } else { ", and there is no portmapper on port 111" };
            let text = format!("port {port} of {} is no mount service{why}; name it by mountport=", url.host);
            Err(unreachable(peer, text))
        }
        Err(error) => Err(match Broken::from(error) {
            Broken::Lost(error) => unreachable(peer, format!("{} gave up: {error}", service())),
            Broken::Final(fault) => fault.at("mount", &peer.store),
        }),
    }
}

/// Asks the portmapper, if there is one.
async fn port_of_mount(url: &NfsUrl, peer: &Peer) -> Result<Option<u16>> {
    let Ok(mut rpc) = call_to(peer, PMAP_PORT, false, opaque_auth::default()).await else {
        return Ok(None);
    };
    let wanted = mapping { prog: mount::PROGRAM, vers: mount::VERSION, prot: IPPROTO_TCP, port: 0 };
    let procedure = PMAP_PROG::PMAPPROC_GETPORT as u32;
    let port: u32 = rpc
        .call(portmap::PROGRAM, portmap::VERSION, procedure, &wanted)
        .await
        .map_err(|error| unreachable(peer, format!("the portmapper of {} gave up: {error}", url.host)))?;
    match u16::try_from(port) {
        Ok(port) if port != 0 => Ok(Some(port)),
        _ => {
            let detail =
                format!("the portmapper of {} knows no mount service; name it by mountport=", url.host);
            Err(unreachable(peer, detail))
        }
    }
}

async fn call_to(
    peer: &Peer,
    port: u16,
    reserved: bool,
    credential: opaque_auth<'static>,
) -> io::Result<Rpc> {
    let mut addresses = peer.addresses.clone();
    for address in &mut addresses {
        address.set_port(port);
    }
    let wire = connection::connect(&addresses, reserved).await?;
    Ok(RpcClient::new_with_auth(wire, credential, opaque_auth::default()))
}

fn unreachable(peer: &Peer, detail: String) -> BackendError {
    BackendError::Unreachable { store: peer.store.clone(), detail }
}

fn refused(url: &NfsUrl, peer: &Peer, status: mountstat3) -> BackendError {
    let path = peer.store.clone();
    let told = |kind, text: &dyn Display| {
        let source = io::Error::new(kind, format!("{text} ({status})"));
        BackendError::Io { action: "mount", path: path.clone(), source }
    };
    match status {
        mountstat3::MNT3ERR_NOENT | mountstat3::MNT3ERR_NOTDIR => BackendError::NotFound { path },
        mountstat3::MNT3ERR_ACCES | mountstat3::MNT3ERR_PERM => {
            let port = if peer.reserved { "" } else { ", or wants a port below 1024, which root has" };
            let export = &url.export;
            let text = format!("the server has no export {export} for this host and user{port}");
            told(io::ErrorKind::PermissionDenied, &text)
        }
        _ => told(io::ErrorKind::Other, &"the server refuses the mount"),
    }
}
