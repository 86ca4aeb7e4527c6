//! The reason codes: one enum, kebab-case outside, never reused for another meaning.

use std::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Info,
    /// Wrong, but every snapshot still reads right.
    Warning,
    /// Some snapshot cannot be read right.
    Error,
}

impl Severity {
    /// The word that `--json` shows.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

macro_rules! codes {
    ($($(#[doc = $doc:expr])+ $name:ident = $text:literal, $severity:ident,
        $meaning:literal, $risk:literal, $todo:literal;)+) => {
        /// A stable reason code of a finding, a refusal or a failure.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code { $($(#[doc = $doc])+ $name,)+ }

        impl Code {
            /// Every code, in the order of `qchain explain --list`.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The code as it is printed.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// How bad a finding with this code is.
            #[must_use]
            pub fn severity(self) -> Severity {
                match self { $(Self::$name => Severity::$severity,)+ }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)+ }
            }

            /// What is at risk.
            #[must_use]
            pub fn risk(self) -> &'static str {
                match self { $(Self::$name => $risk,)+ }
            }

            /// What to do about it.
            #[must_use]
            pub fn advice(self) -> &'static str {
                match self { $(Self::$name => $todo,)+ }
            }
        }
    };
}

codes! {
    /// A backing name leads to no known member.
    MissingParent = "missing-parent", Error,
        "The image names a backing file that is no member of any configured store.",
        "The member and all above it cannot be read beyond what they hold themselves.",
        "Configure the other stores of the zone (--store), or the prefix under which hosts mount this one (url, alias); otherwise restore the file.";
    /// Backing names form a circle.
    Cycle = "cycle", Error,
        "Following the backing names leads back to the same member.",
        "No member of the circle can be read.",
        "Find out who wrote the names; the right parent is in CloudStack's snapshot_store_ref and in the checkpoint file.";
    /// A backing name has a prefix nobody configured, but its tail fits one member.
    UnknownPrefix = "unknown-prefix", Warning,
        "A backing name starts with a path that belongs to no configured store; its tail from snapshots/ fits just one member, which is taken.",
        "None while the guess is right.",
        "Add the store's url, or the prefix as an alias.";
    /// A backing name fits several members.
    AmbiguousParent = "ambiguous-parent", Error,
        "A backing name fits members of several stores and no prefix decides between them.",
        "Reading the chain would be a guess, so it is not done.",
        "Give each store its url or an alias.";
    /// A backing name that is no path of a store at all.
    OutsideName = "outside-name", Error,
        "A backing name points outside every store (a protocol, a json: description, an escape by .., a NUL byte, an overlong name). It was not opened.",
        "Opening it would read something that is no snapshot; it may be an attack.",
        "Treat the image as hostile until its origin is known.";
    /// The file ends before something it refers to.
    Truncated = "truncated", Error,
        "The file ends before data or tables that it refers to.",
        "What lay past the end is lost; QEMU reads zeros there without a word.",
        "Restore the file from a copy; do not merge it.";
    /// Not a qcow2 image.
    NotQcow2 = "not-qcow2", Error,
        "The file does not begin as a qcow2 image does.",
        "It cannot be read as a member.",
        "See what wrote it; files of other hypervisors are left alone.";
    /// A backing format other than qcow2.
    WrongFormat = "wrong-format", Error,
        "The image says that its backing file has another format than qcow2.",
        "Reading it as qcow2, or the other way round, gives wrong data.",
        "Check the backing file; correct the name with qemu-img rebase -u -F qcow2.";
    /// A header field breaks the format.
    BadHeader = "bad-header", Error,
        "A field of the qcow2 header is outside what the format or QEMU allows.",
        "The image cannot be read.",
        "Restore the file from a copy.";
    /// A table is larger than any real image needs.
    HugeTable = "huge-table", Error,
        "A table is declared larger than QEMU itself allows; no memory was taken for it.",
        "The image cannot be read; it may be an attack.",
        "Treat the image as hostile until its origin is known.";
    /// A table entry breaks the format.
    BadEntry = "bad-entry", Error,
        "An entry of an L1, L2 or refcount table is misaligned, out of range, or has reserved bits set.",
        "The guest range behind the entry cannot be read.",
        "Restore the file from a copy; qemu-img check tells more.";
    /// Two guest clusters share one host cluster.
    SharedCluster = "shared-cluster", Error,
        "Two places of the image refer to the same host cluster, which no writer of snapshots does.",
        "A small file can claim endless data; a merge would multiply it.",
        "Treat the image as hostile until its origin is known.";
    /// Metadata overlaps metadata or data.
    Overlap = "overlap", Error,
        "Two structures of the image lie on the same bytes.",
        "Writing to the image through QEMU would destroy data; reading may already be wrong.",
        "Restore the file from a copy; qemu-img check tells more.";
    /// A refcount is lower than the references found.
    RefcountTooLow = "refcount-too-low", Error,
        "A cluster is used more often than its reference count says.",
        "A writer would take the cluster for free and overwrite it. Reading is right.",
        "Merge the member away, or run qemu-img check -r all on a copy.";
    /// A refcount is higher than the references found.
    LeakedCluster = "leaked-cluster", Info,
        "A cluster is counted as used, but nothing refers to it.",
        "None but the space.",
        "A merge of the member leaves the leak behind.";
    /// The COPIED flag disagrees with the refcount.
    CopiedFlag = "copied-flag", Error,
        "An entry's COPIED flag disagrees with the cluster's reference count.",
        "A writer may change a shared cluster, or copy one needlessly. Reading is right.",
        "Run qemu-img check -r all on a copy.";
    /// The dirty bit is set.
    Dirty = "dirty", Info,
        "The image was not closed cleanly; with lazy refcounts its reference counts may be behind.",
        "None for reading.",
        "Nothing; a merge writes fresh counts.";
    /// The corrupt bit is set.
    MarkedCorrupt = "marked-corrupt", Error,
        "QEMU itself marked the image corrupt.",
        "What it reads may be wrong.",
        "Restore the file from a copy.";
    /// The image has an external data file.
    DataFile = "data-file", Error,
        "The image keeps its data in another file. That file was not opened.",
        "Reading it would open a name that the image chose.",
        "Convert the image with QEMU if its origin is trusted.";
    /// The image is encrypted.
    Encrypted = "encrypted", Error,
        "The image is encrypted (AES or LUKS); the storage side has no key.",
        "None; it is left alone.",
        "Manage encrypted snapshots on the hypervisor.";
    /// An incompatible feature bit that is not known.
    UnknownFeature = "unknown-feature", Error,
        "The header has an incompatible feature bit that this version does not know.",
        "Reading it could give wrong data.",
        "Use a newer qchain, or convert the image with QEMU.";
    /// A compressed cluster does not decompress.
    BadCompression = "bad-compression", Error,
        "A compressed cluster does not decompress to one cluster.",
        "The guest range of that cluster is lost.",
        "Restore the file from a copy.";
    /// The member holds internal snapshots.
    HasInternalSnapshots = "has-internal-snapshots", Warning,
        "The image holds internal snapshots; a merge would drop them.",
        "None; reading is right.",
        "Remove them with qemu-img snapshot -d before deleting or merging this member.";
    /// The member holds persistent bitmaps.
    HasBitmaps = "has-bitmaps", Warning,
        "The image holds persistent dirty bitmaps; a merge would drop them.",
        "None; reading is right.",
        "Remove them with qemu-img bitmap --remove before deleting or merging this member.";
    /// The chain is deeper than any chain may be.
    TooDeep = "too-deep", Error,
        "The chain has more members than qchain reads in one go.",
        "None by itself; QEMU cannot open such a chain either.",
        "Delete members in the middle of the chain first.";
    /// The member is still being made.
    Incoming = "incoming", Info,
        "The member is still being made: QEMU writes it, or its checkpoint file is missing or names another parent, or it changed a moment ago.",
        "Changing it would spoil a backup that is running.",
        "Wait for the backup to end. --now waives only the time since its last change.";
    /// QEMU has the member open for writing.
    Locked = "locked", Info,
        "Some process holds QEMU's image lock on the member.",
        "Changing it would pull data from under that process.",
        "Find the process (lslocks) and wait for it.";
    /// CloudStack does not say that the member was deleted.
    NotDeletable = "not-deletable", Error,
        "CloudStack's records do not show the member as Hidden or Destroyed.",
        "Merging it away would delete a snapshot that a user still has.",
        "Give the rows with --records, or say --assume-deleted if you know better.";
    /// The newest member of a chain.
    EndOfChain = "end-of-chain", Error,
        "The member is the newest of its chain: the hypervisor will name it as parent of its next increment.",
        "The next increment would have no parent.",
        "Delete it with --end-of-chain, only if the chain has been ended in CloudStack.";
    /// A member that is a full base.
    AlreadyBase = "already-base", Info,
        "The member is a full base: it reads no other file, and there is nothing to be folded into it.",
        "None; nothing was done.",
        "Name a member above it, if its chain is to be shorter.";
    /// What is no snapshot that can be given a base of its own.
    NotConsolidable = "not-consolidable", Error,
        "The member is the empty stand-in of a deleted one, a temporary file of CloudStack's, or by its row being moved or removed: it is not made a full base.",
        "None; nothing was done.",
        "Name a snapshot that CloudStack keeps.";
    /// The directory was never given to qchain.
    NotInitialised = "not-initialised", Error,
        "The directory has no .qchain/store.json: it was never opted in, is not mounted, or is another mount.",
        "A change in the wrong directory.",
        "Check the mount; then qchain init --store DIR.";
    /// The store's format is newer than this program.
    NewerStore = "newer-store", Error,
        "The store was written by a newer qchain that asks older ones to keep off.",
        "An older program may undo what it does not know.",
        "Use the newer version; reading verbs still work.";
    /// The store is primary storage.
    PrimaryStorage = "primary-storage", Error,
        "The store is a pool of primary storage (layout = \"primary\"), which qchain reads and never changes.",
        "None; nothing was done.",
        "Name the other stores alone, with --store.";
    /// A store of the zone is not configured or not there.
    StoreAbsent = "store-absent", Error,
        "A store that belongs to the zone is not configured or not present, so children on it cannot be ruled out.",
        "A child on that store would lose its parent.",
        "Mount it and name it with --store; or run init again if the zone has changed.";
    /// Nothing has that name.
    NotFound = "not-found", Error,
        "No member has that name.",
        "None.",
        "See qchain list.";
    /// A name fits several members.
    Ambiguous = "ambiguous", Error,
        "The name fits several members.",
        "None; nothing was done.",
        "Give the install path, with STORE: before it if need be.";
    /// The command line is wrong.
    Usage = "usage", Error,
        "The command line or the configuration is wrong.",
        "None; nothing was done.",
        "See qchain --help.";
    /// Not confirmed.
    NotConfirmed = "not-confirmed", Error,
        "The change was not confirmed.",
        "None; nothing was done.",
        "Say --yes where there is no terminal to ask on.";
    /// The name is taken.
    TargetExists = "target-exists", Error,
        "Something has the name already under which an image was to be made.",
        "None; nothing was written over.",
        "Choose another name; --overwrite replaces a file that is no member of a chain and that QEMU does not have open.";
    /// Read-only.
    ReadOnly = "read-only", Error,
        "A changing command was called with --read-only, or on an export or file system that is read-only for this user.",
        "None; nothing was done.",
        "Leave --read-only away; export the directory for writing, also to this host and user.";
    /// Another operation is at work on the store.
    StoreBusy = "store-busy", Info,
        "Another qchain changes this store or tree now.",
        "None.",
        "Wait for it.";
    /// The forced mode is not possible here.
    ModeImpossible = "mode-impossible", Error,
        "The mode asked for cannot be used here.",
        "None; nothing was done.",
        "Use --mode auto, or read the reason in the message.";
    /// Owner or attributes cannot be kept.
    Squashed = "squashed", Error,
        "The new file could not be given the owner, group, mode, ACL or attributes of the old one.",
        "Hypervisors might no longer be able to read the member.",
        "Run as the files' owner or as root on an export without root squash.";
    /// A checkpoint file cannot be edited.
    CheckpointUnreadable = "checkpoint-unreadable", Error,
        "A checkpoint file that must follow the change cannot be read as libvirt's XML.",
        "The next incremental backup of that volume could fail.",
        "Look at the file; --force leaves it as it is.";
    /// The proof failed.
    ProofFailed = "proof-failed", Error,
        "The new image, read again from the store, does not resolve to the same sources as the old chain. It was thrown away.",
        "None: the old files were not touched. It is a bug or failing storage.",
        "Report it with the log; check the storage.";
    /// A file changed while it was used.
    ChangedMeanwhile = "changed-meanwhile", Error,
        "A file was changed or replaced by somebody else while the operation ran.",
        "None: the operation stopped before its decision.",
        "Try again when the other actor is done.";
    /// An error stopped an operation that was decided.
    Decided = "decided", Error,
        "The operation was decided, and then the store failed: what is left of it is done by whoever recovers it.",
        "None: every view is right. Until then deleted members may have their names, and take their space.",
        "See to the storage; then qchain recover, or any change, which begins with that.";
    /// A tree that nothing is done to until somebody has looked.
    Frozen = "frozen", Error,
        "An operation on the member's tree was found to be wrong, so nothing more is done to the tree.",
        "None by itself: the old files were put back or are still in trash.",
        "Read the reason; look at the files; then qchain recover --thaw OPERATION.";
    /// A record of a change that cannot be read.
    BadChangeRecord = "bad-change-record", Error,
        "A record in .qchain/ that says how a change goes on cannot be read.",
        "The change stays half done; every view is right all the same.",
        "Look at the file named; a newer qchain may have written it.";
    /// An operation that cannot be undone.
    NotUndoable = "not-undoable", Error,
        "The operation cannot be undone: its old files are gone, it was made in place, or a later one builds on it.",
        "None; nothing was done.",
        "Undo the later operation first, if the message names one.";
    /// Operations are not over.
    OpenOperations = "open-operations", Error,
        "Operations are half done, or keep old files for an undo.",
        "Without their records they could be neither finished nor undone.",
        "See qchain history; run qchain recover, then qchain purge --all, then try again.";
    /// A deleted member that still has its name.
    Leaving = "leaving", Info,
        "The member was deleted and merged away; it keeps its name until its readers have had their grace.",
        "None.",
        "Nothing; qchain purge or the next change moves it on when it is due.";
    /// A deleted member that cannot go.
    Kept = "kept", Warning,
        "A deleted member keeps its name because another file reads through it now.",
        "Its space is not given back.",
        "Delete it again when that reader is gone, or merge it away anew.";
    /// A kept file that is not what was put there.
    TrashChanged = "trash-changed", Error,
        "A file kept in trash is not the one that was put there; it was left alone.",
        "Somebody wrote into a file after it was replaced: that write may be lost to the member.",
        "Compare the file in .qchain/trash with the member before removing it.";
    /// QEMU sees a difference between old and new.
    WitnessDiffers = "witness-differs", Error,
        "qemu-img finds a difference between a survivor and the old chain it replaced. The old files were put back and the tree is frozen.",
        "None if the old files are whole; it is a bug or failing storage.",
        "Report it with the log; check the storage; then qchain recover --thaw OPERATION.";
    /// Never adopted.
    NotAdopted = "not-adopted", Info,
        "The member has no manifest: nothing is known of what its bytes should be.",
        "Damage to its data would not be noticed.",
        "qchain adopt reads it once and keeps the digests of its blocks.";
    /// Not the file that was adopted.
    ChangedSinceAdoption = "changed-since-adoption", Error,
        "Something has written to the member's file, or has put another one under its name, since it was adopted, and its content is another one.",
        "The snapshot may not be what it was; what stands on it reads wrong.",
        "Find out who wrote it. If the new content is right, qchain adopt --accept-changed takes it; else restore the file from a copy (qchain repair).";
    /// Another file with the same content.
    Rewritten = "rewritten", Info,
        "The member's file was written anew since it was adopted, and says what it said.",
        "None.",
        "qchain adopt takes note of the new file.";
    /// The same parent under another name.
    Relinked = "relinked", Info,
        "The backing name in the member's header was changed since it was adopted, and leads to the same parent.",
        "None.",
        "Nothing needs to be done.";
    /// Another parent.
    ReParented = "re-parented", Warning,
        "The backing name in the member's header was changed since it was adopted, and leads to another parent.",
        "None if both read the same under it; verify --level data looks.",
        "qchain adopt binds it to the new parent if its view is the same.";
    /// The parent's content is not what it was.
    ParentChanged = "parent-changed", Error,
        "The member's parent is not the one that it was adopted on: its view is another one.",
        "The member's view is wrong wherever it shows its parent.",
        "Put the right parent back; CloudStack's snapshot_store_ref and the checkpoint file name it.";
    /// Bytes that are not what they were.
    DataDamaged = "data-damaged", Error,
        "Blocks of the member do not hash to the leaves that were kept of them.",
        "The named ranges of this snapshot, and of those that show them, are not what was backed up.",
        "qchain repair takes the blocks from a copy; nothing is deleted by itself.";
    /// Damage of another member.
    ShowsDamage = "shows-damage", Error,
        "A member below is damaged, and this one shows the damaged part.",
        "The snapshot cannot be read right there.",
        "Repair the member that is named.";
    /// Tables that are not what they were.
    MetadataDamaged = "metadata-damaged", Error,
        "The member's header or tables are not what they were when it was adopted, although nothing wrote to the file.",
        "Any part of the snapshot may be read from a wrong place.",
        "Restore the file from a copy (qchain repair); do not merge it.";
    /// A manifest that cannot be read.
    ManifestDamaged = "manifest-damaged", Warning,
        "The member's manifest cannot be read.",
        "None for the member; damage to its data would not be noticed.",
        "If a copy agrees on its digest (qchain digest), adopt it again.";
    /// A leaf table that cannot be read.
    LeavesDamaged = "leaves-damaged", Warning,
        "The member's leaf table cannot be read.",
        "None for the member; damage to its data would not be noticed.",
        "If qchain digest still gives the digest in its manifest, adopt it again with --accept-changed.";
    /// Known to be damaged.
    Quarantined = "quarantined", Error,
        "The member was found damaged, and nothing was found right since.",
        "What is made from it would pass the damage on.",
        "qchain repair takes what is damaged from a copy; then verify it. --force goes on, and marks the result.";
    /// A file name that cannot be a member's name.
    BadName = "bad-name", Warning,
        "A name on the store is no UTF-8, too long, or has control characters.",
        "It is not managed.",
        "Rename or remove the file.";
    /// A symlink or special file where a member would be.
    SpecialFile = "special-file", Warning,
        "A symbolic link, device, socket or pipe lies where a member would be. It was not followed or opened.",
        "It is not managed.",
        "Find out who made it.";
    /// A file has several names.
    HardLinked = "hard-linked", Warning,
        "The file has more than one name.",
        "Changing one name leaves the other with the old content.",
        "Find the other name (find -samefile).";
    /// Not enough space.
    NoSpace = "no-space", Error,
        "There is not enough free space on the store.",
        "None; the operation stopped and its files were removed.",
        "Free the bytes named in the message.";
    /// The records could not be read.
    BadRecords = "bad-records", Error,
        "The file given with --records is not the output of scripts/export-records.sql.",
        "None; nothing was done.",
        "Export it again with mysql --batch.";
    /// The database's URL is none.
    BadUrl = "bad-url", Error,
        "The URL given with --database cannot be used.",
        "None; nothing was done.",
        "Write mysql://USER:PASSWORD@HOST:PORT/DATABASE, or ?socket=PATH behind it.";
    /// The database cannot be talked to.
    Database = "database", Error,
        "CloudStack's database could not be reached, refused, or took too long.",
        "None to the files. Row changes that were not made are on record, and recover --database makes them.",
        "See the message; try again.";
    /// A row names a store that is not configured.
    UnknownStore = "unknown-store", Warning,
        "CloudStack's rows name an image store that is none of the configured ones.",
        "Children may lie there that are not seen; nothing below them is touched.",
        "Configure the store, with the url that CloudStack has for it.";
    /// The bounds of the call were reached.
    LeftForLater = "left-for-later", Info,
        "The call's bounds, bytes or time, were reached before this.",
        "None; nothing was done to it.",
        "Run the command again.";
    /// A merge that would take more than it gives.
    NoGain = "no-gain", Info,
        "Several members read it, and where extents cannot be shared their copies take more than it does.",
        "None; its space stays held.",
        "It goes when all but one of its children are gone, or with qchain delete.";
    /// Rows and files tell different stories.
    RowsDisagree = "rows-disagree", Warning,
        "CloudStack's rows and the backing names on the stores do not name the same children of a member.",
        "A backup or a migration may be under way; the member is left alone.",
        "Wait for what CloudStack is doing, export the rows again; else see qchain audit.";
    /// Rows are not what they were when the change was planned.
    RowsChanged = "rows-changed", Warning,
        "CloudStack changed a row after the change was planned.",
        "None; that change was not made.",
        "Run it again with fresh rows.";
    /// Rows that follow a merge are not changed yet.
    RowsPending = "rows-pending", Info,
        "A merge was made, and CloudStack's rows do not say so yet.",
        "None; CloudStack deletes and counts the old snapshot as before.",
        "Run qchain recover --database URL.";
    /// A row whose file is missing.
    RowWithoutFile = "row-without-file", Warning,
        "CloudStack's records name a file that is not on the store.",
        "The snapshot cannot be restored.",
        "See whether another store has it.";
    /// A file that no row names.
    OrphanFile = "orphan-file", Warning,
        "No row of CloudStack names the file, and it has been left alone for some hours.",
        "It takes space. Rows that are older than the file, or of other stores only, do not know it either.",
        "Export the rows again; if there is still none, nothing of CloudStack's will remove the file: do it by hand.";
    /// A file of a flatten that was left behind.
    LeakedTemporary = "leaked-temporary", Warning,
        "A flattened copy that CloudStack made for a moment is still there.",
        "It takes as much space as a full image.",
        "Remove it, if no download or new volume still reads it.";
    /// A checkpoint file without its snapshot.
    OrphanCheckpoint = "orphan-checkpoint", Warning,
        "A checkpoint file has no snapshot of its name.",
        "None by itself; as long as it is there, increments of its volume count as still being made until they have theirs.",
        "Remove it, if no other checkpoint file names it as parent.";
    /// A checkpoint file that libvirt would refuse.
    CheckpointRefused = "checkpoint-refused", Warning,
        "A checkpoint file names a parent that has no checkpoint file, so libvirt refuses to define it.",
        "The next increment of that volume fails, or begins a new chain.",
        "Find out who removed the parent; end the chain in CloudStack, or correct the name.";
    /// A checkpoint file that a row names is missing.
    CheckpointMissing = "checkpoint-missing", Warning,
        "CloudStack's row names a checkpoint file, and there is none.",
        "The next increment of that volume fails, or begins a new chain.",
        "Restore the file from a copy, or end the chain in CloudStack.";
    /// The row's length of the file is another.
    FileSizeDisagrees = "file-size-disagrees", Info,
        "The file's length is not the physical size in CloudStack's row.",
        "Sizes shown to users and counted for usage are wrong; the snapshot reads right.",
        "Nothing, or qchain reclaim with --rows; a merge changes the length.";
    /// The row's size of the disk is another.
    DiskSizeDisagrees = "disk-size-disagrees", Warning,
        "The image's virtual size is not the size in CloudStack's row.",
        "A volume made from the snapshot may be too small, or quotas wrong.",
        "Find out which of both is right.";
    /// The row's parent is another.
    ParentDisagrees = "parent-disagrees", Warning,
        "CloudStack's row and the image's header name different parents.",
        "CloudStack may delete a file that is still read, or keep one for nobody.",
        "Trust the header for reading; find out what moved or rebased the file.";
    /// A full base whose row still names a parent.
    StandsAlone = "stands-alone", Info,
        "By its row the snapshot stands on another; by header and checkpoint file it is a full base, as qchain consolidate makes it.",
        "CloudStack keeps the old parent for it, although nobody reads that.",
        "Nothing has to be done: qchain reclaim knows it. To set its row right, run the statements of consolidate --rows print.";
    /// Space that a deleted member holds.
    HiddenBytes = "hidden-bytes", Info,
        "The user deleted the snapshot, and its file keeps its size for those that build on it.",
        "None but the space.",
        "Run qchain reclaim.";
    /// A deleted member that nobody builds on.
    HiddenTip = "hidden-tip", Warning,
        "CloudStack hides the snapshot, which nobody builds on any more, and did not remove its file.",
        "It takes space, and nothing of CloudStack's removes it.",
        "Run qchain reclaim if snapshots are said to build on it that do not read it; else remove it with qchain delete --records FILE --end-of-chain.";
    /// A destroyed snapshot whose file is still there.
    DestroyedFile = "destroyed-file", Warning,
        "By its row the snapshot is Destroyed, and its file is still there.",
        "It takes space; what builds on it would be lost if somebody removed it by hand.",
        "Remove it with qchain delete --records FILE, which looks after what builds on it.";
    /// Files of other hypervisors.
    ForeignFiles = "foreign-files", Info,
        "The store has snapshots of other hypervisors than KVM. They were counted and not opened.",
        "None.",
        "Nothing.";
    /// A chain longer than the policy.
    ChainTooLong = "chain-too-long", Warning,
        "A chain has more members than [policy] max_length allows.",
        "Each member costs every reader a file; QEMU cannot open a chain of some 900 members.",
        "Run qchain consolidate; or delete members that are no longer needed, run qchain reclaim, or end the chain in CloudStack.";
    /// A base older than the policy.
    BaseTooOld = "base-too-old", Warning,
        "The full base of a chain is older than [policy] max_base_age allows.",
        "All snapshots of the chain depend on that one old file.",
        "Run qchain consolidate; or end the chain in CloudStack, so that the next snapshot is a full one.";
    /// More held bytes than the policy.
    PinnedBytes = "pinned-bytes", Warning,
        "Deleted members of a chain hold more bytes than [policy] max_pinned_bytes allows.",
        "None but the space.",
        "Run qchain reclaim.";
    /// Input or output failed.
    Io = "io", Error,
        "Reading or writing failed.",
        "Unknown until the storage is looked at; published files are never half-written.",
        "See the message and the kernel's log.";
    /// A store's server does not answer.
    Unreachable = "unreachable", Error,
        "The server of an nfs:// store cannot be found, connected to, or did not answer within the time-out of the store's URL.",
        "None for the store: it is only read. What was not read is not known.",
        "See that the server runs, that host, port and mountport are right, and that no firewall is between; a slow server may need a longer ?timeout=.";
    /// Another zone does not answer, or the connection failed.
    PeerUnreachable = "peer-unreachable", Error,
        "The service of another zone cannot be reached, did not answer in time, or the connection was cut again and again.",
        "None: what came so far is kept for a day, and the next try goes on from there.",
        "See that the service runs there, that [zones.NAME] has its URL and certificate, and that no firewall is between; then run the copy again.";
    /// Another zone said what cannot be.
    PeerWrong = "peer-wrong", Error,
        "What another zone sent is not what it had announced: leaves or blocks that do not hash to what they should, more bytes than there are, or an answer that is none.",
        "None here: nothing of the member was kept. The other zone, or somebody in between, is broken or hostile.",
        "Run verify --level data there; see that the certificate in [zones.NAME] is the right one.";
    /// A name at the destination stands for another view.
    OtherView = "other-view", Error,
        "A member that is to come has a name that is taken here, by a file with another view.",
        "None; nothing was replaced.",
        "Give the file here another name or delete it, or copy to another account and volume with --map.";
    /// The service does not know who asks.
    Unauthorized = "unauthorized", Error,
        "The request had no bearer token that the service knows.",
        "None; nothing was done.",
        "Send 'Authorization: Bearer TOKEN' with a token of the file [server] tokens; after a change of that file send the service SIGHUP.";
    /// The token does not reach that far.
    Forbidden = "forbidden", Error,
        "The token is known, and its scope does not allow the request.",
        "None; nothing was done.",
        "Use a token with the scope that the message names: read, operate or admin.";
    /// One key for two requests.
    KeyReused = "key-reused", Error,
        "The idempotency key was used before with another request.",
        "None; nothing was done. The first request stands.",
        "Use a new key for each request that is meant to be a new one.";
    /// Too many jobs wait.
    QueueFull = "queue-full", Error,
        "The service keeps as many jobs as it may.",
        "None; nothing was done.",
        "Try again when jobs are done, or have fewer finished ones kept.";
    /// The request is too large.
    TooLarge = "too-large", Error,
        "The request has more bytes than the service takes.",
        "None; nothing was done.",
        "Send less at once: members can be named by a prefix that ends in a slash.";
    /// The service is ending, or too busy.
    Unavailable = "unavailable", Info,
        "The service is ending, or as busy as it may be.",
        "None; a job that was made is kept and continued.",
        "Try again a little later, or ask another instance.";
    /// A job came to no end, again and again.
    JobInterrupted = "job-interrupted", Error,
        "The job was begun several times, and each time the service ended before it did.",
        "None for the data: what was interrupted is finished or taken back by recovery.",
        "Find out why the service ended; then make the job anew.";
    /// The user stopped it.
    Cancelled = "cancelled", Info,
        "The operation was stopped by the user.",
        "None; what was not published was removed.",
        "Run it again.";
    /// A capability is missing.
    Unsupported = "unsupported", Error,
        "The store or the image lacks something that the operation needs.",
        "None; nothing was done.",
        "See the message.";
}

impl Code {
    /// The code with that printed form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == text)
    }
}

impl serde::Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::Code;

    #[test]
    fn every_code_is_kebab_case_unique_and_explained() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            let text = code.as_str();
            assert!(seen.insert(text), "{text} twice");
            assert!(text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{text}");
            assert_eq!(Code::parse(text), Some(*code));
            for sentence in [code.meaning(), code.risk(), code.advice()] {
                assert!(sentence.ends_with('.'), "{text}: {sentence}");
            }
        }
        assert_eq!(Code::parse("no-such-code"), None);
    }
}
