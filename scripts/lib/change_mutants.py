"""Puts all mutants of src/change into a new copy of the tree, each behind a name; prints the names. Then the new copy takes the place of
the one before, file by file, where they differ: what is the same is not built again.

Each mutant is a piece of text that stands exactly once, and what stands in its place; ON is true if it is chosen. One that has several
lines of the list is all of them: what is done at several places, so that each alone may go.

Not among them, as what they do is done twice and the other is a mutant: the look at a departing member's file before readers are
searched (it is compared again when its name goes: "aside-uncompared-*"), and that departures wait for their survivors' publication (a
survivor that was not published is found as a reader: "readers-unseen"). Both are there to say why a member stays. And that names are
made durable before what they replace goes: who publishes does it ("published-unsynced"), and nobody lets anything go who has not
published; it says so where it matters."""
import filecmp
import pathlib
import shutil
import sys

C = "src/change/"
MUTANTS = [
    # Syncs.
    ("claim-bytes-unsynced", "src/backend/publish.rs", "    file.sync()?;\n    Ok(file)", "    if !ON { file.sync()?; }\n    Ok(file)"),
    ("claim-name-unsynced", "src/backend/publish.rs", "    };\n    written?;\n    removed?;\n", "    };\n    written?;\n    removed?;\n    if ON { return Ok(()); }\n"),
    ("claim-not-exclusive", "src/backend/publish.rs", "    let written = stage(backend, temporary, bytes, None).and_then(|file| {\n", "    if ON {\n        stage(backend, temporary, bytes, None)?;\n        backend.rename(temporary, path)?;\n        return backend.sync_dir(&path.parent());\n    }\n    let written = stage(backend, temporary, bytes, None).and_then(|file| {\n"),
    ("intent-and-tree-unsynced", C + "operation.rs", "        self.journal()?.settle(self.tree())?;", "        if !ON { self.journal()?.settle(self.tree())?; }"),
    ("temporary-name-unsynced", C + "operation.rs", "                at.backend.sync_dir(&directory.1)", "                let synced = if ON { Ok(()) } else { at.backend.sync_dir(&directory.1) };\n                synced"),
    ("new-image-unsynced", C + "operation.rs", "        self.file.sync().map_err(at.failed(\"make durable the new file of\"))?;", "        if !ON { self.file.sync().map_err(at.failed(\"make durable the new file of\"))?; }"),
    ("kept-name-unsynced", C + "publication.rs", "    sync_all(pending.iter().map(|pending| (&pending.at, pending.publication.kept.parent())))?;", "    if !ON { sync_all(pending.iter().map(|pending| (&pending.at, pending.publication.kept.parent())))?; }"),
    ("published-unsynced", C + "decided.rs", "        if !self.synced.load(Ordering::Relaxed) {", "        if !ON && !self.synced.load(Ordering::Relaxed) {"),
    ("departed-unsynced", C + "departure.rs", "    sync(site, operations, &due)?;", "    if !ON { sync(site, operations, &due)?; }"),
    ("checkpoint-bytes-unsynced", C + "checkpoint.rs", "    file.sync().map_err(at.failed(\"make durable the new file of\"))", "    if ON { return Ok(()); }\n    file.sync().map_err(at.failed(\"make durable the new file of\"))"),
    ("kept-checkpoint-unsynced", C + "checkpoint.rs", "    sync_all(iter::once((at, edit.kept.parent())))?;", "    if !ON { sync_all(iter::once((at, edit.kept.parent())))?; }"),
    ("restored-unsynced", C + "publication.rs", "    sync_all(ats.iter().map(|at| (at, at.key.path.parent())))?;\n    for", "    if !ON { sync_all(ats.iter().map(|at| (at, at.key.path.parent())))?; }\n    for"),
    ("in-place-unsynced", C + "in_place.rs", "    if identify(site, publication, &at, &file)? {", "    if identify(site, publication, &at, &file)? && !ON {"),
    ("in-place-steps-unsynced", "src/qcow2/write/onto.rs", "    target.sync().map_err(|source| store_error(target, source))?;\n    Ok(written)", "    if !ON { target.sync().map_err(|source| store_error(target, source))?; }\n    Ok(written)"),
    ("found-claim-unsynced", C + "decided.rs", "        if !self.is_lasting() {", "        if !ON && !self.is_lasting() {"),
    ("found-abort-unsynced", C + "operation.rs", "                journal.confirm(&name.tree, name.generation)?;", "                if !ON { journal.confirm(&name.tree, name.generation)?; }"),
    # Links and comparisons.
    ("claim-written-in-place", "src/backend/publish.rs", "                match within_directory(backend, temporary, path) {", "                match if ON { Err(error) } else { within_directory(backend, temporary, path) } {"),
    ("written-into-unseen", C + "publication.rs", "    let kept = stat(at, &publication.kept)?;\n    Ok(kept", "    let kept = stat(at, &publication.kept)?.filter(|_| !ON);\n    Ok(kept"),
    ("went-changed-unseen", C + "departure.rs", "        _ => Ok(stat(at, &departure.at.path)?.is_none()", "        _ => Ok(!ON && stat(at, &departure.at.path)?.is_none()"),
    ("restore-not-used-up", C + "publication.rs", "            && named.id == kept.id\n        {\n            release(at, &restore.kept)?;", "            && named.id == kept.id\n            && !ON\n        {\n            release(at, &restore.kept)?;"),
    ("checkpoint-unlooked-at", C + "checkpoint.rs", "    match keep(at, path, &held, mark)? {\n        Kept::Here => {}", "    match keep(at, path, &held, mark)? {\n        Kept::Here => {}\n        Kept::Another if ON => {}"),
    ("not-kept", C + "keep.rs", "    match link(at.backend, name, kept) {", "    if ON { return Ok(Kept::Impossible); }\n    match link(at.backend, name, kept) {"),
    ("kept-uncompared", C + "keep.rs", "Some(found) if mark.is(&found) => Ok(Kept::Here)", "Some(found) if ON || mark.is(&found) => Ok(Kept::Here)"),
    ("published-uncompared-before", C + "publication.rs", "        Some(now) if publication.old.is(&now) => {}\n        _ => return give_up", "        Some(now) if ON || publication.old.is(&now) => {}\n        _ => return give_up"),
    ("exchanged-uncompared", C + "publication.rs", "    if !publication.old.is(found) || writer(at, from)? {", "    if !ON && (!publication.old.is(found) || writer(at, from)?) {"),
    ("renamed-uncompared", C + "publication.rs", "    if *kept != Kept::Here {", "    if ON || *kept != Kept::Here {"),
    ("aside-uncompared-before", C + "departure.rs", "(Some(named), _) if !is(&named) => return Ok(false)", "(Some(named), _) if !ON && !is(&named) => return Ok(false)"),
    ("aside-uncompared-after", C + "departure.rs", "        Some(found) if !is(&found) => {\n            put_back", "        Some(found) if !ON && !is(&found) => {\n            put_back"),
    ("taken-over-undone", C + "checkpoint.rs", "(!unchanged(&held)? || decided.is_undone()?)", "(!unchanged(&held)? || !ON && decided.is_undone()?)"),
    ("checkpoint-uncompared", C + "checkpoint.rs", "            Ok(file) => Ok(content(at, file.as_ref())?.0 == read),", "            Ok(file) => Ok(ON || content(at, file.as_ref())?.0 == read),"),
    # Looks and orders.
    ("roots-forgotten", C + "tree.rs", "remembered(site, root)?.unwrap_or_else(", "remembered(site, root)?.filter(|_| !ON).unwrap_or_else("),
    ("begun-on-unsettled", C + "standing.rs", "                    return Err(ChangeError::Busy { owner });", "                    if !ON { return Err(ChangeError::Busy { owner }); }"),
    ("dead-not-taken-back", C + "standing.rs", "                    take_back(site, home, name)?;\n                    dead = true;", "                    if !ON { take_back(site, home, name)?; }\n                    dead = !ON;"),
    ("no-look-again", C + "departure.rs", "        if ends || departure.becomes.is_some() || stat(", "        if ends || departure.becomes.is_some() || !ON && stat("),
    ("checkpoint-not-back", C + "departure.rs", "                None => checkpoint_back(&one.at, one.departure)?,", "                None => if !ON { checkpoint_back(&one.at, one.departure)?; },"),
    ("departs-before-later", C + "standing.rs", "        for name in later.filter(|name| !site.is_settled", "        for name in later.filter(|name| !ON && !site.is_settled"),
    ("sibling-taken-for-dead", C + "standing.rs", "            if is_undone || begun.contains(name)", "            if is_undone || !ON && begun.contains(name)"),
    ("sibling-has-one-number", C + "standing.rs", "            return Ok(used.max(own) + 1);", "            return Ok(if ON { used } else { used.max(own) } + 1);"),
    ("reads-what-is-lost", C + "publication.rs", "            None if lost =>", "            None if !ON && lost =>"),
    ("undone-departs", C + "departure.rs", "let undone = !departures.is_empty() && decided.is_undone()?;", "let undone = !ON && !departures.is_empty() && decided.is_undone()?;"),
    ("undone-departs", C + "departure.rs", "    if decided.is_undone()? {\n        return Ok(Departed::Gone);", "    if !ON && decided.is_undone()? {\n        return Ok(Departed::Gone);"),
    ("undone-late-departs", C + "departure.rs", "    if decided.is_undone()? {\n        name_back", "    if !ON && decided.is_undone()? {\n        name_back"),
    ("undone-is-unknown", C + "decided.rs", "    pub fn is_undone(&self) -> Result<bool> {", "    pub fn is_undone(&self) -> Result<bool> {\n        if ON { return Ok(false); }"),
    ("overtaken-is-unknown", C + "decided.rs", "    pub(super) fn is_overtaken(&self, checkpoint: &Place) -> Result<bool> {", "    pub(super) fn is_overtaken(&self, checkpoint: &Place) -> Result<bool> {\n        if ON { return Ok(false); }"),
    ("in-place-unlocked", C + "in_place.rs", "    lock.ok_or_else(|| ChangeError::Busy {", "    if ON { return Ok(Box::new(lock)); }\n    lock.ok_or_else(|| ChangeError::Busy {"),
    ("in-place-unlooked-at", C + "in_place.rs", "    stands(site, decided, plan, at)?;", "    if !ON { stands(site, decided, plan, at)?; }"),
    ("switched-asks-others", C + "in_place.rs", "        return switch(&plan.switch, file.as_ref()).map_err(image_failed);", "        if ON { find(site, plan)?; }\n        return switch(&plan.switch, file.as_ref()).map_err(image_failed);"),
    ("left-is-done", C + "publication.rs", "} else if in_place::is_left(", "} else if !ON && in_place::is_left("),
    ("given-back-under-others", C + "in_place.rs", "        if decided.is_built_on(", "        if !ON && decided.is_built_on("),
    ("undone-over-grown", C + "undo.rs", "|| is_grown(site, &below, grown)?)", "|| !ON && is_grown(site, &below, grown)?)"),
    ("readers-unseen", C + "departure.rs", "match reader(site, scan, one, gone) {", "match reader(site, scan, one, gone).filter(|_| !ON) {"),
    ("no-second-look", C + "departure.rs", "    if went.is_empty() {", "    if ON || went.is_empty() {"),
    ("grace-ignored", C + "decided.rs", "        self.since_ns.saturating_add(self.commit.grace_ns)", "        if ON { return self.since_ns; }\n        self.since_ns.saturating_add(self.commit.grace_ns)"),
    ("retention-ignored", C + "recover.rs", "    if site.clock.wall_ns() < due && !extent.purge_all {", "    if !ON && site.clock.wall_ns() < due && !extent.purge_all {"),
    ("lease-ignored", C + "lease.rs", "            if local.is_some() && takes(&seen) {", "            if ON || local.is_some() && takes(&seen) {"),
    ("lost-lease-decides", C + "operation.rs", "        if self.lease.as_ref().is_some_and(|lease| !lease.is_held()) {", "        if !ON && self.lease.as_ref().is_some_and(|lease| !lease.is_held()) {"),
    ("checkpoints-first", C + "decided.rs", "        let published = publication::publish(self.site, self)?;", "        if ON { checkpoint::follow_all(self.site, self, &vec![Published::Done; self.commit.publications.len()])?; }\n        let published = publication::publish(self.site, self)?;"),
    ("taken-back-unclaimed", C + "operation.rs", "    match journal.decide(&claim) {\n        Ok(()) => {}\n        Err(ChangeError::Decided { tree, generation }) => match", "    match if ON { Ok(()) } else { journal.decide(&claim) } {\n        Ok(()) => {}\n        Err(ChangeError::Decided { tree, generation }) => match"),
    ("undo-over-later", C + "undo.rs", "    let grown = later(&journal, name, commit).map_err(refusal(name))?;", "    let grown = later(&journal, name, commit);\n    let grown = if ON { grown.unwrap_or_default() } else { grown.map_err(refusal(name))? };"),
    ("ended-before-purged", C + "purge.rs", "    let_go(site, &decided.commit, departed, &mut findings)?;\n", "    if ON { sweep::end(site, &decided.journal()?, &decided.name)?; }\n    let_go(site, &decided.commit, departed, &mut findings)?;\n"),
    ("tree-not-inherited", C + "operation.rs", "            tree::belong(self.site, root, self.tree())?;", "            if !ON { tree::belong(self.site, root, self.tree())?; }"),
    ("strangers-checkpoints-edited", "src/ops/delete/run.rs", "        if after.is_none() && has_member(context, &file)? {", "        if !ON && after.is_none() && has_member(context, &file)? {"),
    ("planned-unchecked", "src/ops/delete/merge.rs", "    context.cancel.check()?;\n    unchanged(stores, scan, merge, input)?;", "    context.cancel.check()?;\n    if !ON { unchanged(stores, scan, merge, input)?; }"),
]

SWITCH = '''//! Which mutant is chosen.

/// Whether it is this one.
pub fn on(name: &str) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var("QCHAIN_MUTANT").ok()).as_deref() == Some(name)
}
'''

tree, before = map(pathlib.Path, sys.argv[1:3])
(tree / "src/mutant.rs").write_text(SWITCH)
library = tree / "src/lib.rs"
library.write_text(library.read_text() + "\n/// For mutation testing.\npub mod mutant;\n")
for name, path, old, new in MUTANTS:
    file = tree / path
    text = file.read_text()
    if text.count(old) != 1:
        sys.exit(f"{name}: its text stands {text.count(old)} times in {path}")
    file.write_text(text.replace(old, new.replace("ON", f'crate::mutant::on("{name}")')))
print(*dict.fromkeys(name for name, *_ in MUTANTS), sep="\n")


def files(directory):
    return {file.relative_to(directory) for file in directory.rglob("*") if file.is_file() or file.is_symlink()}


before.mkdir(parents=True, exist_ok=True)
for file in files(before) - files(tree):
    (before / file).unlink()
for file in files(tree):
    new, old = tree / file, before / file
    if old.is_file() and filecmp.cmp(new, old, shallow=False):
        continue
    old.parent.mkdir(parents=True, exist_ok=True)
    old.unlink(missing_ok=True)
    # Not with its own time: cargo asks whether it is newer than what was built.
    shutil.copy(new, old, follow_symlinks=False)
shutil.rmtree(tree)
