//! Names as CloudStack, `qemu-img` and attackers write them.

use proptest::prelude::*;

use super::{At, Form, NameError, NameMap, PrefixKind, StoreNames, Style, Target};
use crate::cloudstack::prefix::StoreUrl;
use crate::failure::Code;
use crate::ids::{StoreId, StorePath};

const ALIAS: &str = "/mnt/11111111-2222-3333-8444-555555555555";

fn path(text: &str) -> StorePath {
    StorePath::parse(text).unwrap()
}

fn names(id: &str, root: &str, url: &str, aliases: &[&str]) -> StoreNames {
    let aliases: Vec<String> = aliases.iter().map(|alias| (*alias).to_owned()).collect();
    let url = StoreUrl::parse(url).unwrap();
    StoreNames::new(StoreId::parse(id).unwrap(), Some(root), Some(&url), &aliases)
}

/// Two stores: `sec1` with an alias, `sec2` mounted inside the directory of `sec1`.
fn map() -> NameMap {
    NameMap::new(vec![
        names("sec1", "/mnt/secondary/", "nfs://10.1.2.3/export/sec1", &[ALIAS, "not-absolute"]),
        names("sec2", "/mnt//secondary/./two", "nfs://nas/export/sec2", &[]),
    ])
}

/// What lies there: `(store, path)`.
const FILES: [(usize, &str); 8] = [
    (0, "snapshots/2/7/base"),
    (0, "snapshots/2/7/a:b"),
    (0, "snapshots/2/9/other"),
    (0, "snapshots/2/7/both"),
    (1, "snapshots/2/7/both"),
    (1, "snapshots/2/7/far"),
    (1, "snapshots/2/7/snapshots/2/7/base"),
    (0, "template/tmpl/1/4/t.qcow2"),
];

fn exists(store: usize, path: &StorePath) -> bool {
    FILES.contains(&(store, path.as_str()))
}

fn resolve(name: &[u8]) -> Target {
    map().resolve(name, At { store: 0, path: &path("snapshots/2/7/child") }, &exists)
}

/// The member and the kind of prefix a name gives, `None` for a relative one.
fn member(name: &str) -> (usize, String, Option<PrefixKind>) {
    match resolve(name.as_bytes()) {
        Target::Member { store, path, form } => {
            let kind = match form {
                Form::Relative => None,
                Form::Absolute { kind, .. } => Some(kind),
            };
            (store, path.to_string(), kind)
        }
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn relative_names_resolve_beside_the_image() {
    for (name, expected) in [
        ("base", "snapshots/2/7/base"),
        ("./base", "snapshots/2/7/base"),
        ("./a:b", "snapshots/2/7/a:b"),
        ("../9/other", "snapshots/2/9/other"),
        ("..//9/./other", "snapshots/2/9/other"),
        ("../../../template/tmpl/1/4/t.qcow2", "template/tmpl/1/4/t.qcow2"),
    ] {
        assert_eq!(member(name), (0, expected.to_owned(), None), "{name}");
    }
    assert_eq!(resolve(b"far"), Target::Missing);
    assert_eq!(resolve(b"nobody"), Target::Missing);
}

#[test]
fn absolute_names_resolve_by_each_prefix() {
    let base = |prefix: &str| format!("{prefix}/snapshots/2/7/base");
    let url = StoreUrl::parse("nfs://10.1.2.3/export/sec1").unwrap();
    for (name, kind) in [
        (base("/mnt/secondary"), PrefixKind::Root),
        (base("//mnt/./secondary/"), PrefixKind::Root),
        (base(ALIAS), PrefixKind::Alias),
        (base(&url.host_prefix()), PrefixKind::Host),
        (base(&url.system_vm_prefix().unwrap()), PrefixKind::SystemVm),
    ] {
        assert_eq!(member(&name), (0, "snapshots/2/7/base".to_owned(), Some(kind)), "{name}");
    }
    // The longest prefix counts, even if a shorter one would find something.
    assert_eq!(member("/mnt/secondary/two/snapshots/2/7/far").0, 1);
    assert_eq!(resolve(b"/mnt/secondary/two/snapshots/2/7/base"), Target::Missing);
    // Under a known prefix there is no guessing.
    assert_eq!(resolve(format!("{ALIAS}/snapshots/2/7/far").as_bytes()), Target::Missing);
    assert_eq!(resolve(format!("{ALIAS}x/snapshots/9/9/base").as_bytes()), Target::Missing);
}

#[test]
fn unknown_prefixes_are_guessed_only_if_one_member_fits() {
    let unknown = Some(PrefixKind::Unknown);
    assert_eq!(member("/mnt/else/snapshots/2/7/far"), (1, "snapshots/2/7/far".to_owned(), unknown));
    let target = resolve(b"/mnt/else/snapshots/2/7/far");
    assert_eq!(target.code(), Some(Code::UnknownPrefix));
    let Target::Member { form: Form::Absolute { prefix, .. }, .. } = target else { panic!("{target:?}") };
    assert_eq!(prefix, "/mnt/else");
    assert_eq!(
        resolve(b"/mnt/else/snapshots/2/7/both"),
        Target::Ambiguous(vec![(0, path("snapshots/2/7/both")), (1, path("snapshots/2/7/both"))])
    );
    // Two tails of one name fit two members.
    assert_eq!(resolve(b"/x/snapshots/2/7/snapshots/2/7/base").code(), Some(Code::AmbiguousParent));
    assert_eq!(resolve(b"/mnt/else/snapshots/2/7/nobody"), Target::Missing);
    assert_eq!(resolve(b"/mnt/else/template/tmpl/1/4/t.qcow2"), Target::Missing);
    assert_eq!(resolve(b"/etc/passwd"), Target::Missing);
}

#[test]
fn one_prefix_for_two_stores_is_decided_by_what_exists() {
    let url = "nfs://nas/e";
    let map = NameMap::new(vec![names("a", "/a", url, &["/mnt/x"]), names("b", "/b", url, &["/mnt/x"])]);
    let child = path("snapshots/2/7/child");
    let resolve = |name: &str| map.resolve(name.as_bytes(), At { store: 0, path: &child }, &exists);
    assert!(matches!(resolve("/mnt/x/snapshots/2/7/far"), Target::Member { store: 1, .. }));
    assert!(matches!(resolve("/mnt/x/snapshots/2/7/both"), Target::Ambiguous(_)));
}

#[test]
fn what_is_no_plain_name_is_outside() {
    let long = "x/".repeat(512) + "base";
    let wide = "x".repeat(300);
    for name in [
        &b""[..],
        b"json:{\"driver\":\"file\"}",
        b"nbd://host/export",
        b"file:/mnt/secondary/snapshots/2/7/base",
        b"a:b",
        b":",
        b"base\0",
        b"/mnt/secondary/snapshots/2/7/base\n",
        b"\xff\xfe",
        "\u{85}".as_bytes(),
        b"../../../../etc/passwd",
        b"/mnt/secondary/../etc/passwd",
        b"/mnt/secondary/snapshots/../../two/snapshots/2/7/far",
        b"/../../mnt/x",
        b"/",
        b"/mnt/secondary",
        b"base/",
        b"base/.",
        b"..",
        b"../../..",
        long.as_bytes(),
        wide.as_bytes(),
    ] {
        let target = resolve(name);
        assert!(matches!(target, Target::Outside(_)), "{:?}: {target:?}", String::from_utf8_lossy(name));
        assert_eq!(target.code(), Some(Code::OutsideName));
    }
}

fn name_for(parent: (usize, &str), style: Style, old: &Form) -> Result<String, NameError> {
    let (parent, child) = (At { store: parent.0, path: &path(parent.1) }, path("snapshots/2/7/child"));
    map().name_for(parent, At { store: 0, path: &child }, style, old, 0)
}

fn absolute(kind: PrefixKind, prefix: &str) -> Form {
    Form::Absolute { kind, prefix: prefix.to_owned() }
}

#[test]
fn new_names_are_bare_or_keep_the_form() {
    let alias = absolute(PrefixKind::Alias, ALIAS);
    let sibling = (0, "snapshots/2/7/base");
    assert_eq!(name_for(sibling, Style::Relative, &alias).unwrap(), "base");
    assert_eq!(name_for(sibling, Style::Relative, &Form::Relative).unwrap(), "base");
    assert_eq!(name_for((0, "snapshots/2/7/a:b"), Style::Relative, &alias).unwrap(), "./a:b");
    assert_eq!(name_for(sibling, Style::Keep, &alias).unwrap(), format!("{ALIAS}/snapshots/2/7/base"));
    assert_eq!(name_for(sibling, Style::Keep, &Form::Relative).unwrap(), "base");
    let cousin = (0, "snapshots/2/9/other");
    assert_eq!(name_for(cousin, Style::Relative, &Form::Relative).unwrap(), "../9/other");
    assert_eq!(name_for(cousin, Style::Relative, &alias).unwrap(), format!("{ALIAS}/snapshots/2/9/other"));
    assert_eq!(
        name_for((0, "template/tmpl/1/4/t.qcow2"), Style::Keep, &Form::Relative).unwrap(),
        "../../../template/tmpl/1/4/t.qcow2"
    );
}

#[test]
fn a_parent_on_another_store_takes_the_same_kind_of_prefix() {
    // The same directory and name, but on another store: never the bare name.
    let far = (1, "snapshots/2/7/far");
    let sec2 = StoreUrl::parse("nfs://nas/export/sec2").unwrap().host_prefix();
    let host = absolute(PrefixKind::Host, "/mnt/whatever");
    assert_eq!(name_for(far, Style::Relative, &host).unwrap(), format!("{sec2}/snapshots/2/7/far"));
    let root = absolute(PrefixKind::Root, "/mnt/secondary");
    assert_eq!(name_for(far, Style::Relative, &root).unwrap(), "/mnt/secondary/two/snapshots/2/7/far");
    assert!(matches!(name_for(far, Style::Relative, &Form::Relative), Err(NameError::OtherStore { .. })));
    // sec2's URL has a host name, so its mount on the system VM is not known.
    for kind in [PrefixKind::SystemVm, PrefixKind::Alias, PrefixKind::Unknown] {
        let error = name_for(far, Style::Relative, &absolute(kind, "/mnt/p")).unwrap_err();
        assert!(matches!(error, NameError::NoPrefix { .. }), "{kind:?}");
    }
    let long = absolute(PrefixKind::Alias, &format!("/{}", "x".repeat(1020)));
    assert!(matches!(
        name_for((0, "snapshots/2/9/other"), Style::Keep, &long),
        Err(NameError::TooLong { length: 1041, .. })
    ));
}

proptest! {
    #[test]
    fn any_bytes_end_well(name in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = resolve(&name);
    }

    #[test]
    fn pieces_of_names_never_leave_the_stores(
        pieces in prop::collection::vec(
            prop::sample::select(vec!["/", "..", ".", "snapshots", "mnt", "secondary", "two", "2", "7", "base", "x"]),
            0..12,
        )
    ) {
        let name = pieces.concat();
        if let Target::Member { store, path, .. } = resolve(name.as_bytes()) {
            prop_assert!(exists(store, &path));
        }
    }

    #[test]
    fn names_written_are_read_back(
        store in 0_usize..2,
        directory in prop::sample::select(vec!["snapshots/2/7", "snapshots/2", "a", "", "snapshots/2/7/x/y", "a:b"]),
        file in prop::sample::select(vec!["p", "a:b", "snapshots"]),
        style in prop::sample::select(vec![Style::Relative, Style::Keep]),
        form in prop::sample::select(vec![
            Form::Relative,
            absolute(PrefixKind::Root, "/mnt/secondary"),
            absolute(PrefixKind::Alias, ALIAS),
        ]),
    ) {
        let parent = if directory.is_empty() { path(file) } else { path(directory).join(file).unwrap() };
        let child = path("snapshots/2/7/child");
        let (parent, child) = (At { store, path: &parent }, At { store: 0, path: &child });
        if let Ok(name) = map().name_for(parent, child, style, &form, 0) {
            let only = |store: usize, path: &StorePath| (store, path) == (parent.store, parent.path);
            match map().resolve(name.as_bytes(), child, &only) {
                Target::Member { store, path, .. } => {
                    prop_assert_eq!((store, &path), (parent.store, parent.path));
                }
                other => prop_assert!(false, "{}: {:?}", name, other),
            }
        }
    }
}
