//! `qchain list`.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;

use super::context::Context;
use super::error::{Exit, Result};
use super::members;
use super::output::{self, Table, human};
use crate::database::read_export;
use crate::ops::list::{Chain, Entry, ListOptions, ListReport, list, weigh};
use crate::store::names::resolve_all;
use crate::store::record::StoreKind;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the chains of these members
    members: Vec<String>,
    /// Draw each chain as a tree
    #[arg(long)]
    tree: bool,
    /// CloudStack's rows: the output of scripts/export-records.sql
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
}

/// Lists.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let names = members::expand(&args.members)?;
    let records = args.records.as_deref().map(read_export).transpose()?;
    let stores = context.stores()?;
    let scan = context.scan_cached(&stores)?;
    let chosen = if names.is_empty() { None } else { Some(resolve_all(&stores, &scan, &names)?) };
    let options = ListOptions { members: chosen.as_deref(), records: records.as_ref() };
    let mut report = list(&stores, &scan, &options, &context.cancel)?;
    if let Some(records) = &records {
        weigh(&stores, &scan, records, &mut report.chains, context.progress(), &context.cancel)?;
    }
    context.print(&report, |out| {
        let write = if args.tree { write_trees } else { write_table };
        write(out, &report)?;
        write_gains(out, &report)?;
        write_stores(out, &report)?;
        output::findings(out, &report.findings)
    })?;
    Ok(Exit::DONE)
}

fn write_table(out: &mut dyn Write, report: &ListReport) -> io::Result<()> {
    let head = ["MEMBER", "STATE", "DISK", "FILE", "TAKES", "PARENT"];
    let mut table = Table::new(&head, &[false, false, true, true, true, false]);
    for entry in report.chains.iter().flat_map(|chain| &chain.members) {
        table.row(vec![
            entry.member.clone(),
            entry.state.clone(),
            entry.virtual_bytes.map_or_else(|| "?".to_owned(), human),
            human(entry.file_bytes),
            human(entry.allocated_bytes),
            entry.parent.as_deref().map_or("-", last).to_owned(),
        ]);
    }
    table.write(out)
}

fn last(member: &str) -> &str {
    member.rsplit('/').next().unwrap_or(member)
}

fn write_trees(out: &mut dyn Write, report: &ListReport) -> io::Result<()> {
    for chain in &report.chains {
        let mut table = Table::new(&["MEMBER", "STATE", "DISK", "TAKES"], &[false, false, true, true]);
        for (lead, entry) in drawn(chain) {
            table.row(vec![
                format!("{lead}{}", entry.member),
                entry.state.clone(),
                entry.virtual_bytes.map_or_else(|| "?".to_owned(), human),
                human(entry.allocated_bytes),
            ]);
        }
        table.write(out)?;
        writeln!(out)?;
    }
    Ok(())
}

/// What stands before each member: only a fork moves to the right, so that long chains stay readable.
fn drawn(chain: &Chain) -> Vec<(String, &Entry)> {
    let by_name: HashMap<&str, &Entry> =
        chain.members.iter().map(|entry| (entry.member.as_str(), entry)).collect();
    let mut below: HashMap<&str, String> = HashMap::new();
    let mut lines = Vec::with_capacity(chain.members.len());
    for entry in &chain.members {
        let parent = entry.parent.as_deref().and_then(|name| by_name.get(name));
        let before = parent.and_then(|parent| below.get(parent.member.as_str())).cloned();
        let (lead, under) = match (parent, before) {
            (Some(parent), Some(before)) if parent.children.len() > 1 => {
                if parent.children.last() == Some(&entry.member) {
                    (format!("{before}└─● "), format!("{before}   "))
                } else {
                    (format!("{before}├─● "), format!("{before}│  "))
                }
            }
            (Some(_), Some(before)) => (format!("{before}● "), before),
            // The base, or where a circle was cut open.
            _ => ("● ".to_owned(), String::new()),
        };
        below.insert(&entry.member, under);
        lines.push((lead, entry));
    }
    lines
}

fn write_stores(out: &mut dyn Write, report: &ListReport) -> io::Result<()> {
    for store in &report.stores {
        let kind = store.kind.word();
        match (&store.capabilities, store.initialised) {
            (Some(can), _) => writeln!(out, "{}: {kind}, {}", store.store, output::capabilities(can))?,
            (None, true) => writeln!(out, "{}: {kind}", store.store)?,
            (None, false) if store.kind == StoreKind::Primary => {
                writeln!(out, "{}: primary storage, which is only read", store.store)?;
            }
            (None, false) => writeln!(out, "{}: not opted in, looks like {kind}", store.store)?,
        }
    }
    Ok(())
}

fn write_gains(out: &mut dyn Write, report: &ListReport) -> io::Result<()> {
    for chain in &report.chains {
        let (Some(pinned), Some(base)) = (chain.pinned_bytes, chain.members.first()) else { continue };
        if pinned > 0 {
            let frees = chain.merge_frees_bytes.flatten();
            let frees = frees.map_or_else(
                || "cannot be merged".to_owned(),
                |bytes| format!("a merge frees about {}", human(bytes)),
            );
            writeln!(out, "{}: deleted members hold {}; {frees}", base.member, human(pinned))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::drawn;
    use crate::ops::list::{Chain, Entry};

    fn entry(name: &str, parent: Option<&str>, children: &[&str]) -> Entry {
        Entry {
            member: name.to_owned(),
            store: "s".to_owned(),
            parent: parent.map(str::to_owned),
            children: children.iter().map(|child| (*child).to_owned()).collect(),
            virtual_bytes: None,
            file_bytes: 0,
            allocated_bytes: 0,
            state: String::new(),
            cluster_bytes: None,
            record: None,
            incoming: None,
        }
    }

    #[test]
    fn forks_move_to_the_right() {
        let members = vec![
            entry("a", None, &["b"]),
            entry("b", Some("a"), &["c", "e"]),
            entry("c", Some("b"), &["d"]),
            entry("d", Some("c"), &[]),
            entry("e", Some("b"), &["f"]),
            entry("f", Some("e"), &[]),
        ];
        let chain = Chain { tree: 0, members, pinned_bytes: None, merge_frees_bytes: None };
        let lines: Vec<String> =
            drawn(&chain).into_iter().map(|(lead, entry)| format!("{lead}{}", entry.member)).collect();
        assert_eq!(lines, ["● a", "● b", "├─● c", "│  ● d", "└─● e", "   ● f"]);
    }
}
