//! Files as libvirt and CloudStack write them, and as nobody should.

use proptest::prelude::*;

use super::{Checkpoint, CheckpointError, MAX_BYTES, set_parent};

/// As `virsh checkpoint-dumpxml` gives it, with a domain that has names and parents of its own.
const DUMPED: &str = "<domaincheckpoint>
  <name>s3</name>
  <parent>
    <name>s2</name>
  </parent>
  <creationTime>1700000000</creationTime>
  <disks>
    <disk name='vda' checkpoint='bitmap' bitmap='s3'/>
  </disks>
  <domain type='qemu'>
    <name>i-2-7-VM</name>
    <parent><name>s2</name></parent>
    <metadata><x:parent xmlns:x='u'><name>s2</name></x:parent></metadata>
  </domain>
</domaincheckpoint>
";

fn parsed(xml: &str) -> Result<(String, Option<String>), CheckpointError> {
    Checkpoint::parse(xml.as_bytes()).map(|checkpoint| (checkpoint.name, checkpoint.parent))
}

fn edited(xml: &str, parent: Option<&str>) -> String {
    String::from_utf8(set_parent(xml.as_bytes(), parent).unwrap()).unwrap()
}

#[test]
fn only_the_parents_name_changes() {
    assert_eq!(parsed(DUMPED), Ok(("s3".to_owned(), Some("s2".to_owned()))));
    let expected = DUMPED.replacen("<name>s2</name>", "<name>s1</name>", 1);
    assert_eq!(edited(DUMPED, Some("s1")), expected);
    assert_eq!(edited(&expected, Some("s1")), expected, "once more changes nothing");
}

#[test]
fn the_parent_goes_with_the_space_before_it() {
    let expected = DUMPED.replacen("\n  <parent>\n    <name>s2</name>\n  </parent>", "", 1);
    assert_eq!(edited(DUMPED, None), expected);
    assert_eq!(parsed(&expected), Ok(("s3".to_owned(), None)));
    assert_eq!(edited(&expected, None), expected, "once more changes nothing");
}

#[test]
fn other_ways_to_write_the_same() {
    // As Java's transformer writes it: a declaration, one line; and the parent first.
    let java = "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"no\"?><domaincheckpoint>\
                <parent><name>s2</name></parent><name>s3</name></domaincheckpoint>";
    assert_eq!(edited(java, Some("a")), java.replace(">s2<", ">a<"));
    assert_eq!(edited(java, None), java.replace("<parent><name>s2</name></parent>", ""));
    for (text, name) in [
        ("s&amp;2", "s&2"),
        ("&#115;2", "s2"),
        ("<![CDATA[s<2]]>", "s<2"),
        ("<!-- s9 -->s2", "s2"),
        ("s<!-- s9 -->2", "s2"),
        ("\n   s2\n ", "s2"),
        ("s<?pi s9?>2", "s2"),
    ] {
        let xml = |text: &str| {
            format!(
                "<domaincheckpoint><name>s3</name><parent a='>'><name>{text}</name ></parent\n></domaincheckpoint>\n"
            )
        };
        assert_eq!(parsed(&xml(text)), Ok(("s3".to_owned(), Some(name.to_owned()))), "{text}");
        assert_eq!(edited(&xml(text), None), "<domaincheckpoint><name>s3</name></domaincheckpoint>\n");
        let kept = match text {
            "<!-- s9 -->s2" => "<!-- s9 -->new",
            "s<!-- s9 -->2" => "new<!-- s9 -->",
            "s<?pi s9?>2" => "new<?pi s9?>",
            _ => "new",
        };
        assert_eq!(edited(&xml(text), Some("new")), xml(kept), "{text}");
        assert_eq!(edited(&xml(text), Some("a<b&c")), xml(&kept.replace("new", "a&lt;b&amp;c")), "{text}");
    }
}

#[test]
fn a_byte_order_mark_and_wide_characters_do_not_shift_the_edit() {
    let xml = "\u{feff}<domaincheckpoint><description>\u{e9}\u{20ac}\u{1f600}</description>\
               <name>s3</name> <parent><name>s2</name></parent></domaincheckpoint>";
    assert_eq!(edited(xml, Some("s1")), xml.replace(">s2<", ">s1<"));
    assert_eq!(edited(xml, None), xml.replace(" <parent><name>s2</name></parent>", ""));
}

#[test]
fn what_is_not_libvirts_is_refused() {
    let wrap = |inner: &str| format!("<domaincheckpoint>{inner}</domaincheckpoint>");
    for xml in [
        String::new(),
        "no xml".to_owned(),
        "<domainsnapshot><name>s</name></domainsnapshot>".to_owned(),
        "<domaincheckpoint><name>s</name>".to_owned(),
        "<domaincheckpoint/>".to_owned(),
        wrap(""),
        wrap("<name/>"),
        wrap("<name> </name>"),
        wrap("<name>s</name><name>t</name>"),
        wrap("<name>s<b/></name>"),
        wrap("<name>s</name><parent/>"),
        wrap("<name>s</name><parent><name/></parent>"),
        wrap("<name>s</name><parent><name>a</name><name>b</name></parent>"),
        wrap("<name>s</name><parent><name>a</name></parent><parent><name>a</name></parent>"),
        wrap("<name>s</name><parent><name>&unknown;</name></parent>"),
        wrap("<name>s</nome>"),
        wrap("<name>s</name>") + "<domaincheckpoint/>",
        wrap("<name>s</name>") + "x",
        "\u{feff}\u{feff}".to_owned() + &wrap("<name>s</name>"),
        "<?xml version='1.0' encoding='ISO-8859-1'?>".to_owned() + &wrap("<name>s</name>"),
        "<!DOCTYPE x [<!ENTITY y 's'>]>".to_owned() + &wrap("<name>s</name>"),
        wrap(&("<a>".repeat(300) + &"</a>".repeat(300))),
    ] {
        assert!(parsed(&xml).is_err(), "{xml}");
    }
    assert!(Checkpoint::parse(b"<domaincheckpoint><name>\xff</name></domaincheckpoint>").is_err());
    assert_eq!(
        Checkpoint::parse(&vec![b' '; MAX_BYTES + 1]),
        Err(CheckpointError::TooLong { length: MAX_BYTES + 1 })
    );
}

#[test]
fn a_parent_that_is_not_there_yet_follows_the_name() {
    let head = "<domaincheckpoint>\n  <name>s1</name>\n  <disks/>\n</domaincheckpoint>\n";
    let with = head.replace("</name>", "</name><parent><name>s&amp;0</name></parent>");
    assert_eq!(edited(head, Some("s&0")), with);
    assert_eq!(edited(&with, None), head, "and back");
}

#[test]
fn edits_that_cannot_be_made() {
    for name in ["", " s", "s\n", "a\0b"] {
        assert!(
            matches!(set_parent(DUMPED.as_bytes(), Some(name)), Err(CheckpointError::BadName { .. })),
            "{name:?}"
        );
    }
}

proptest! {
    #[test]
    fn any_bytes_end_well(xml in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = set_parent(&xml, Some("x"));
        let _ = set_parent(&xml, None);
    }

    #[test]
    fn any_pieces_end_well_and_edits_hold(
        pieces in prop::collection::vec(
            prop::sample::select(vec![
                "<domaincheckpoint>", "</domaincheckpoint>", "<name>", "</name>", "<parent>", "</parent>", "s",
                " ", "&amp;", "<!-- x -->", "<![CDATA[y]]>", "<a b='c'>", "</a>", "<parent/>", "&", "<", ">",
                "\u{feff}", "<?p?>", "\n",
            ]),
            0..16,
        ),
        wrapped in any::<bool>(),
    ) {
        let mut xml = pieces.concat();
        if wrapped {
            xml = format!("<domaincheckpoint><name>s</name><parent><name>q{xml}</name></parent></domaincheckpoint>");
        }
        for parent in [Some("new"), None] {
            if let Ok(edited) = set_parent(xml.as_bytes(), parent) {
                let got = Checkpoint::parse(&edited).unwrap().parent;
                prop_assert_eq!(got.as_deref(), parent);
            }
        }
    }

    #[test]
    fn one_changed_byte_ends_well(at in 0..DUMPED.len(), byte in any::<u8>()) {
        let mut xml = DUMPED.as_bytes().to_vec();
        xml[at] = byte;
        if let Ok(edited) = set_parent(&xml, Some("new")) {
            let got = Checkpoint::parse(&edited).unwrap().parent;
            prop_assert_eq!(got.as_deref(), Some("new"));
        }
    }
}
