//! What the service is told when it is started. Values only: who reads files and flags is `cli`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::schedule::Schedule;
use crate::change::witness::Witness;
use crate::ops::delete::InPlacePolicy;
use crate::ops::policy::Policy;
use crate::peer::Zone;
use crate::store::StoreConfig;

/// The certificate and key of a TLS server, PEM files. Read again at SIGHUP.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate, followed by those between it and the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Where CloudStack's rows come from.
#[derive(Clone)]
pub enum RowSource {
    /// An export of them; a newer one under its name is seen.
    File(PathBuf),
    /// The URL of the database, which has a password in it.
    Database(String),
}

impl fmt::Debug for RowSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => f.debug_tuple("File").field(file).finish(),
            Self::Database(_) => f.write_str("Database"),
        }
    }
}

/// The service's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// All stores of the zone. Jobs are kept on the first that is opted in.
    pub stores: Vec<StoreConfig>,
    /// Where to listen: `address:port`; port 0 takes a free one.
    pub listen: String,
    /// The file of bearer tokens (see [`auth`](super::auth)). Read again at SIGHUP.
    pub tokens: PathBuf,
    /// TLS, if it is wanted.
    pub tls: Option<TlsFiles>,
    /// Where caches are kept.
    pub cache: Option<PathBuf>,
    /// The one directory of this host into which jobs may write images; none for nowhere.
    pub exports: Option<PathBuf>,
    /// How many jobs run at once.
    pub jobs: usize,
    /// The limit on bytes a second of all jobs together, until somebody changes it; 0 for none.
    pub rate: u64,
    /// How many connections are open at once, at most.
    pub connections: usize,
    /// How long finished jobs are kept.
    pub keep_jobs: Duration,
    /// How long a file without checkpoints must have been left alone.
    pub settle: Duration,
    /// When another instance's lease is taken for abandoned.
    pub lease: Duration,
    /// How long deleted members keep their names; none for what fits the mount.
    pub grace: Option<Duration>,
    /// How long old files are kept after that.
    pub retention: Duration,
    /// When a merge in place may be chosen.
    pub in_place: InPlacePolicy,
    /// Who looks before old files go.
    pub witness: Witness,
    /// How chains should be.
    pub policy: Policy,
    /// What is begun without being asked for.
    pub schedule: Schedule,
    /// CloudStack's rows, for `reclaim`.
    pub rows: Option<RowSource>,
    /// Other zones, which members may be copied from.
    pub zones: Vec<Zone>,
    /// Nothing may be written to any store: jobs that change something are refused.
    pub read_only: bool,
}
