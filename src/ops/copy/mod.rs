//! `copy`: brings members and what they stand on from another zone, or from another store of this host.
//!
//! | module | owns |
//! |---|---|
//! | [`offer`] | the giving side: an opened member, its leaf table, its blocks |
//! | [`peer`] | who gives, as this side sees him; stores of this host as such |
//! | [`plan`] | what of a line has to come. Pure |
//! | `need` | which blocks differ from what is here, by leaf tables |
//! | `fetch` | asking, many requests in flight, checked as answers come |
//! | `fill` | every block into its place: from here, or asked for |
//! | [`reuse`] | other members of the account, which may have blocks, too |
//! | `arrival` | the file in the making, its name |
//! | `proof` | the sealed file, parsed again; its manifest |
//! | [`report`] | what came |
//!
//! Each member comes as a delta over the one that it stands on here, with its own cluster size, in the layout of
//! [`crate::qcow2::layout::canonical`]: all that differs from the view below, and nothing else. What is asked for is
//! what is nowhere in that line, nor, if that is wanted, in the account. The structure below an equal view is each side's own affair.
//!
//! A block is hashed when it comes and written only if it is right; the name is given when the sealed file, parsed
//! again, has every block where it was put and the view digest follows from its leaves. Bytes are not read back unless
//! that is asked for: `verify --level data` has them first on its list.
//!
//! # After a crash
//!
//! A member is there whole or not at all. What came is in `.qchain/tmp` and is kept by the next try; `recover` removes
//! it when it was left alone for a day.

mod arrival;
mod fetch;
mod fill;
mod need;
pub mod offer;
pub mod peer;
pub mod plan;
mod proof;
pub mod report;
pub mod reuse;

use std::collections::BTreeSet;
use std::time::Instant;

use crate::chain::graph::{Key, NodeId};
use crate::change::Site;
use crate::change::leaving::leaving;
use crate::cloudstack::backing::{At, Form, NameMap, Style};
use crate::cloudstack::checkpoint::Checkpoint;
use crate::cloudstack::paths::checkpoint_of;
use crate::failure::Code;
use crate::ids::StorePath;
use crate::ops::{OpError, Result, Work};
use crate::qcow2::Image as Qcow2Image;
use crate::qcow2::layout::Backing;
use crate::qcow2::layout::canonical::{Canonical, Form as ImageForm};
use crate::store::StoreError;
use crate::store::chain::OpenChain;
use crate::store::manifest::leaves::{self, LeafFile};
use crate::store::manifest::shelf::{Known, Shelf, known};
use crate::store::manifest::{Binding, Manifest};
use crate::store::record::StoreKind;
use crate::store::scan::{Incoming, Scan};
use crate::store::stream::Source;
use crate::units::{BLOCK_BYTES, ClusterBits};
use arrival::{Arrival, Image};
use fill::Ours;
use need::{Need, Tables};
pub use offer::{LineMember, MOST_BLOCKS, MOST_TABLE_BYTES, Offer};
pub use peer::{LocalPeer, Peer};
pub use plan::Renaming;
use plan::{Standing, check_line, destination, first_needed};
pub use report::{Copied, CopyReport, Outcome};
use reuse::Account;
pub use reuse::Reuse;

/// What is wanted.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Request {
    /// The members, as the peer calls them.
    pub members: Vec<String>,
    /// Bring each as one full image.
    pub flatten: bool,
    /// Tell what would come.
    pub dry_run: bool,
    /// Read what was written back before it gets its name.
    pub read: bool,
    /// Accounts and volumes that are others here.
    pub renamings: Vec<Renaming>,
    /// Bring checkpoint files, too; where the volume here has some that is done anyway.
    pub checkpoints: bool,
    /// What blocks are looked for in, before they are asked for.
    pub reuse: Reuse,
}

/// Where members go.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    /// This process, on all stores of the zone.
    pub site: &'a Site<'a>,
    /// Which of the stores.
    pub store: usize,
}

/// Brings members. The caller holds the right to change the stores, unless it is a dry run; `scan` looks at the stores
/// as they are now. Blocks.
///
/// # Errors
///
/// `other-view`, `not-adopted`, `no-space`, `peer-wrong`, `peer-unreachable`, `changed-meanwhile`, `proof-failed`,
/// `cancelled`, what the peer refuses with. Members before the one that failed have come. After `peer-wrong` nothing is
/// left of the member; after the others what came is kept for the next try.
pub fn copy(
    peer: &dyn Peer,
    to: &Destination<'_>,
    request: &Request,
    scan: &dyn Fn() -> Result<Scan>,
    work: &Work<'_>,
) -> Result<CopyReport> {
    let started = Instant::now();
    let before = peer.received_bytes();
    let mut report = CopyReport { from: peer.name().to_owned(), ..CopyReport::default() };
    for member in &request.members {
        let run = Run { peer, to, request, work };
        let mut tries = 0;
        loop {
            let line = fetch::stubbornly(work, |_| {
                let line = peer.line(member)?;
                check_line(peer.name(), &line).map(|()| line)
            })?;
            match run.line(&line, &scan()?, &mut report) {
                // Something was merged there meanwhile, and what is left of the line has the same views; or somebody else
                // brought a part of it.
                Err(error) if is_outdated(&error) && tries < TRIES => tries += 1,
                done => break done?,
            }
        }
    }
    report.bytes_on_wire = peer.received_bytes().saturating_sub(before);
    report.elapsed_milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(report)
}

/// How often a line is looked at anew that changes while it is copied.
const TRIES: u32 = 4;
/// How often a leaf table is asked for that turns out to be another one.
const TABLE_TRIES: u32 = 2;
/// What the names of leaf tables in the making begin with.
const LEAVES: &str = "leaves";

/// One call.
struct Run<'a> {
    peer: &'a dyn Peer,
    to: &'a Destination<'a>,
    request: &'a Request,
    work: &'a Work<'a>,
}

/// What is looked at to see what is here.
struct Ground<'a> {
    scan: &'a Scan,
    manifests: Vec<Shelf>,
    leaving: BTreeSet<NodeId>,
}

/// The line that a new member is to stand on here, as far as it goes; base first.
#[derive(Default)]
struct Below {
    keys: Vec<Key>,
    manifests: Vec<Manifest>,
    images: Vec<Qcow2Image>,
    tables: Vec<LeafFile>,
}

impl Below {
    /// The view of one of its members.
    fn chain(&self, layer: usize) -> OpenChain {
        OpenChain::of(self.images.iter().take(layer + 1).rev().cloned().collect())
    }

    /// What a member that is put on it is bound to.
    fn binding(&self) -> Option<Binding> {
        self.manifests.last().map(|manifest| Binding {
            member: manifest.member.clone(),
            id: manifest.id.clone(),
            digest: manifest.view_digest,
        })
    }
}

impl Run<'_> {
    /// Brings what of a line is not here.
    fn line(&self, line: &[LineMember], scan: &Scan, report: &mut CopyReport) -> Result<()> {
        let renamings = &self.request.renamings;
        let plain = self.to.site.stores.get(self.to.store)?.kind() == StoreKind::Plain;
        let targets: Vec<StorePath> =
            line.iter().map(|one| destination(&one.member, renamings, plain)).collect::<Result<_>>()?;
        let ground = Ground {
            scan,
            manifests: Shelf::load_all(self.to.site.stores)?,
            leaving: leaving(self.to.site, scan)?,
        };
        let standing = line.iter().zip(&targets).map(|(one, path)| self.standing(one, path, &ground));
        let standing: Vec<Standing> = standing.collect::<Result<_>>()?;
        let first = first_needed(&standing, &targets, self.request.flatten)?;
        if !self.request.dry_run {
            let here = line.iter().zip(&targets).zip(&standing);
            let here = here.filter(|(_, standing)| matches!(standing, Standing::Equal));
            arrival::tidy(self.to, here.map(|((one, target), _)| (target, one.view_digest)));
        }
        if let (Some(one), Some(target)) = (line.last(), targets.last())
            && first == line.len()
        {
            let present = self.told(one, target, Outcome::Present);
            add(report, present);
            return Ok(());
        }
        let parent = first.checked_sub(1).filter(|_| !self.request.flatten);
        let mut below = match parent.and_then(|at| targets.get(at)) {
            Some(path) => self.below(path, scan)?,
            None => Below::default(),
        };
        // Of the account of what was asked for, whatever else the peer counts to its line.
        let account =
            targets.last().and_then(reuse::account).filter(|_| self.request.reuse == Reuse::Account);
        for (index, (one, target)) in line.iter().zip(&targets).enumerate().skip(first) {
            let under = line.get(..index).unwrap_or_default();
            let before = self.peer.received_bytes();
            let account = account.filter(|account| reuse::account(target) == Some(*account));
            let account = account.map(|account| Account::of(self, &ground, account, &below)).transpose()?;
            let mut copied = self.member(one, under, target, &mut below, account)?;
            if copied.outcome == Outcome::Copied {
                copied.bytes_on_wire = self.peer.received_bytes().saturating_sub(before);
            }
            add(report, copied);
        }
        Ok(())
    }

    fn display(&self, path: &StorePath) -> String {
        self.to.site.stores.display(&Key { store: self.to.store, path: path.clone() })
    }

    fn told(&self, one: &LineMember, target: &StorePath, outcome: Outcome) -> Copied {
        Copied {
            member: self.display(target),
            source: one.name.clone(),
            parent: None,
            outcome,
            digest: one.view_digest,
            virtual_bytes: one.virtual_bytes,
            file_bytes: 0,
            checkpoint: false,
            blocks_sent: 0,
            blocks_present: 0,
            bytes_on_wire: 0,
        }
    }

    /// What is here under a member's name.
    fn standing(&self, one: &LineMember, path: &StorePath, ground: &Ground<'_>) -> Result<Standing> {
        let scan = ground.scan;
        let stores = self.to.site.stores;
        let key = Key { store: self.to.store, path: path.clone() };
        let Some(id) = scan.graph.find(&key) else {
            let backend = stores.get(self.to.store)?.backend();
            let taken = "something that is no image has its name".to_owned();
            let free = backend.stat(path).is_err();
            return Ok(if free { Standing::Free } else { Standing::Taken(Code::OtherView, taken) });
        };
        if ground.leaving.contains(&id) || scan.member(id).is_some_and(|member| member.stub) {
            let message = "a member that was deleted here has its name still".to_owned();
            return Ok(Standing::Taken(Code::Leaving, message));
        }
        Ok(match known(stores, scan, &ground.manifests, id)? {
            Known::Current(manifest) if manifest.view_digest == one.view_digest => Standing::Equal,
            Known::Current(manifest) => Standing::Taken(
                Code::OtherView,
                format!("here its view is {}, there {}", manifest.view_digest, one.view_digest),
            ),
            _ => Standing::Taken(
                Code::NotAdopted,
                "it is here, and it is not known whether it is the same: adopt it first".to_owned(),
            ),
        })
    }

    /// Opens the line that new members are put on.
    fn below(&self, path: &StorePath, scan: &Scan) -> Result<Below> {
        let stores = self.to.site.stores;
        let key = Key { store: self.to.store, path: path.clone() };
        let name = self.display(path);
        let id: NodeId = scan.graph.find(&key).ok_or_else(|| StoreError::NotFound { name: name.clone() })?;
        if scan.member(id).is_some_and(|member| member.incoming == Some(Incoming::Writer)) {
            let message = "QEMU has it open for writing".to_owned();
            return Err(OpError::Refused { code: Code::Incoming, member: name, message });
        }
        let source = Source::open(stores, scan, id, false)?;
        if source.manifests().is_empty() {
            let message = source.missing().unwrap_or("it is not adopted").to_owned();
            return Err(OpError::Refused { code: Code::NotAdopted, member: name, message });
        }
        let mut tables = Vec::new();
        for (key, manifest) in source.keys().iter().zip(source.manifests()) {
            tables.push(leaves::open(stores.get(key.store)?, &stores.display(key), &manifest.leaves)?);
        }
        let mut below = Below {
            keys: source.keys().to_vec(),
            manifests: source.manifests().to_vec(),
            images: source.chain().images().cloned().collect(),
            tables,
        };
        below.keys.reverse();
        below.manifests.reverse();
        below.images.reverse();
        below.tables.reverse();
        Ok(below)
    }

    /// Brings one member, and puts it on the line.
    fn member(
        &self,
        one: &LineMember,
        under: &[LineMember],
        target: &StorePath,
        below: &mut Below,
        account: Option<Account<'_>>,
    ) -> Result<Copied> {
        let arrival = Arrival::begin(self.to, target.clone(), one.view_digest)?;
        if self.to.site.stores.get(self.to.store)?.backend().stat(target).is_ok() {
            arrival.clear("");
            let (member, message) = (self.display(target), "somebody else brought it meanwhile".to_owned());
            return Err(OpError::Refused { code: Code::ChangedMeanwhile, member, message });
        }
        let done = self.bring(&arrival, one, under, below, account);
        match done.as_ref().map_err(failure_code) {
            Ok(_) if self.request.dry_run => arrival.clear(LEAVES),
            // It has its name, or is nothing that anybody could go on with.
            Ok(_) | Err(Code::PeerWrong | Code::OtherView | Code::NotFound) => arrival.clear(""),
            Err(_) => {}
        }
        done
    }

    fn bring(
        &self,
        arrival: &Arrival<'_>,
        one: &LineMember,
        under: &[LineMember],
        below: &mut Below,
        account: Option<Account<'_>>,
    ) -> Result<Copied> {
        let mut own = self.table(arrival, one)?;
        // A member that stands alone shows what all those show that it stands on there.
        let mut lower: Vec<LeafFile> = if self.request.flatten {
            under.iter().map(|one| self.table(arrival, one)).collect::<Result<_>>()?
        } else {
            std::mem::take(&mut below.tables)
        };
        let mut tables = Tables { own: &mut own, below: &mut lower };
        let failed = |source| StoreError::Leaves { member: one.name.clone(), source };
        let digest = tables.digest().map_err(failed)?;
        if digest != one.view_digest {
            let message = format!("its leaves say that the view of {} is {digest}", one.name);
            return Err(peer::wrong(self.peer.name(), message));
        }
        let bits = ClusterBits::new(one.cluster_bits).unwrap_or(ClusterBits::DEFAULT);
        let alone = self.request.flatten || below.keys.is_empty();
        let need = tables.need(bits, alone).map_err(failed)?;
        let mut copied = self.told(one, &arrival.target, Outcome::Planned);
        copied.parent = below.keys.last().filter(|_| !alone).map(|key| self.to.site.stores.display(key));
        if self.request.dry_run {
            let here = self.count_here(one, &need, &mut tables, &Ours::new(below, account))?;
            copied.blocks_present = here + need.filled.len();
            copied.blocks_sent = need.wanted.len().saturating_sub(here);
            copied.bytes_on_wire = one.table_bytes + copied.blocks_sent * BLOCK_BYTES;
            // What is put on it later is told as if this were here.
            below.tables = lower;
            below.tables.push(own);
            below.keys.push(Key { store: self.to.store, path: arrival.target.clone() });
            return Ok(copied);
        }
        let (layout, backing) = self.layout(one, &need, arrival, below, bits)?;
        copied.file_bytes = layout.length();
        let what = format!("image-{}", proof::shape(&layout));
        let (file, is_new) = arrival.file(&what, layout.length())?;
        arrival.room(layout.stored_bytes().saturating_sub(allocated(file.as_ref())))?;
        let image = Image::new(&layout, file.as_ref(), is_new);
        let mut ours = Ours::new(below, account);
        copied.blocks_sent = self.fill(&image, one, &need, &mut tables, &mut ours)?;
        copied.blocks_present = image.count().saturating_sub(copied.blocks_sent);
        arrival.check()?;
        image.seal()?;
        let like = below.images.last().filter(|_| !alone).map(|image| image.file().as_ref());
        arrival.identify(file.as_ref(), like)?;
        file.sync().map_err(fetch::failed(file.as_ref()))?;
        drop(file);
        let made = proof::Made { one, layout: &layout, backing: backing.as_ref(), what: &what, need: &need };
        let (manifest, new) = proof::attest(self, arrival, &made, &mut tables, below)?;
        copied.checkpoint = self.checkpoint(arrival, one)?;
        proof::publish(self, arrival, &made, &manifest, below)?;
        copied.outcome = Outcome::Copied;
        if !self.request.flatten {
            let store = self.to.site.stores.get(self.to.store)?;
            lower.push(leaves::open(store, &copied.member, &manifest.leaves)?);
            below.tables = lower;
            below.keys.push(Key { store: self.to.store, path: arrival.target.clone() });
            below.manifests.push(manifest);
            below.images.push(new);
        }
        Ok(copied)
    }

    /// A member's leaf table, from an earlier try or from the peer.
    fn table(&self, arrival: &Arrival<'_>, one: &LineMember) -> Result<LeafFile> {
        let digits = one.table_blake3.to_string();
        let what = format!("{LEAVES}-{}", digits.get(..16).unwrap_or_default());
        let (file, _) = arrival.file(&what, one.table_bytes)?;
        if let Ok(table) = arrival.open_table(&what, one)? {
            return Ok(table);
        }
        let mut why = String::new();
        for _ in 0..TABLE_TRIES {
            fetch::table(self.peer, one, file.as_ref(), self.work)?;
            match arrival.open_table(&what, one)? {
                Ok(table) => return Ok(table),
                Err(fault) => why = fault,
            }
        }
        Err(peer::wrong(self.peer.name(), format!("{}: {why}", one.name)))
    }

    /// Brings a member's checkpoint file, unless there is one, before the member. Gives whether there is one now.
    fn checkpoint(&self, arrival: &Arrival<'_>, one: &LineMember) -> Result<bool> {
        let Some(path) = checkpoint_of(&arrival.target) else { return Ok(false) };
        // Among others that have one, a member without is taken for one that is still being made.
        let wanted = self.request.checkpoints || arrival.has_beside(&path);
        if !wanted || self.request.flatten {
            return Ok(false);
        }
        let bytes = fetch::stubbornly(self.work, |_| self.peer.checkpoint(one))?;
        let Some(bytes) = bytes else { return Ok(false) };
        // What is none is not put where libvirt reads it.
        if let Err(error) = Checkpoint::parse(&bytes) {
            let message = format!("the checkpoint file of {} is none: {error}", one.name);
            return Err(peer::wrong(self.peer.name(), message));
        }
        arrival.checkpoint(&path, &bytes)?;
        Ok(true)
    }

    /// Where everything goes in the new file, and what it names as its parent.
    fn layout(
        &self,
        one: &LineMember,
        need: &Need,
        arrival: &Arrival<'_>,
        below: &Below,
        bits: ClusterBits,
    ) -> Result<(Canonical, Option<Backing>)> {
        let failed = |source| StoreError::Image { member: one.name.clone(), source };
        let units = need.units.clone();
        let (Some(parent), Some(key), false) = (below.images.last(), below.keys.last(), self.request.flatten)
        else {
            let form = ImageForm::Qcow2(bits);
            return Ok((Canonical::new(one.virtual_bytes, form, units).map_err(failed)?, None));
        };
        let stores = self.to.site.stores;
        let names = NameMap::new(stores.iter().map(|(_, store)| store.names()).collect());
        let at = At { store: key.store, path: &key.path };
        let child = At { store: self.to.store, path: &arrival.target };
        let name = names.name_for(at, child, Style::Relative, &Form::Relative, key.store);
        let name = name.map_err(|error| OpError::Refused {
            code: Code::Unsupported,
            member: self.display(&arrival.target),
            message: error.to_string(),
        })?;
        let backing = Backing {
            name: name.into_bytes(),
            format: "qcow2".to_owned(),
            virtual_size: parent.header().virtual_size,
        };
        let layout = Canonical::over(one.virtual_bytes, bits, units, need.zeros.clone(), backing.clone());
        Ok((layout.map_err(failed)?, Some(backing)))
    }
}

/// A member of several lines is told once.
fn add(report: &mut CopyReport, copied: Copied) {
    if !report.copied.iter().any(|other| other.member == copied.member) {
        report.copied.push(copied);
    }
}

/// Whether a member of the line is not what it was, or gone.
fn is_outdated(error: &OpError) -> bool {
    matches!(failure_code(error), Code::NotFound | Code::ChangedMeanwhile)
}

fn failure_code(error: &OpError) -> Code {
    crate::failure::Failure::code(error)
}

fn allocated(file: &dyn crate::backend::StoreFile) -> u64 {
    file.stat().map_or(0, |stat| stat.allocated_bytes)
}
