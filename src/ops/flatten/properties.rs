//! The file beside a template or volume by which CloudStack knows it (`TemplateLocation`): Java properties.

use std::fmt::Write as _;

use super::place::{Place, Purpose};

/// What it says of the image.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The format's word, as CloudStack has it in lower case.
    pub format: &'static str,
    /// The size of the disk.
    pub virtual_bytes: u64,
    /// The length of the file.
    pub file_bytes: u64,
}

/// The file's text. `filename` is the image's.
pub fn text(place: &Place, filename: &str, facts: &Facts) -> String {
    let Facts { format, virtual_bytes, file_bytes } = facts;
    let unique = escaped(place.name.strip_suffix(&format!(".{format}")).unwrap_or(&place.name));
    let filename = escaped(filename);
    let what = match place.purpose {
        Purpose::Template => "template",
        Purpose::Volume => "volume",
    };
    format!(
        "#{what} made by qchain\nid={}\npublic=false\nuniquename={unique}\nfilename={filename}\nsize={file_bytes}\n\
         physicalSize={file_bytes}\nvirtualsize={virtual_bytes}\n{format}=true\n{format}.filename={filename}\n\
         {format}.size={file_bytes}\n{format}.virtualsize={virtual_bytes}\n",
        place.id
    )
}

/// A value as `java.util.Properties` reads it back.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for unit in text.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte @ (b'\\' | b'#' | b'!' | b'=' | b':' | b' ')) => out.extend(['\\', char::from(byte)]),
            Ok(byte @ b' '..=b'~') => out.push(char::from(byte)),
            // Writing into memory cannot fail.
            _ => drop(write!(out, "\\u{unit:04x}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{Facts, escaped, text};
    use crate::ops::flatten::{Place, Purpose};

    #[test]
    fn a_template_of_cloudstack() {
        let place =
            Place { purpose: Purpose::Template, store: 0, account: 2, id: 203, name: "web-1".to_owned() };
        let facts = Facts { format: "qcow2", virtual_bytes: 1 << 30, file_bytes: 4096 };
        let text = text(&place, "web-1.qcow2", &facts);
        for line in [
            "id=203",
            "uniquename=web-1",
            "filename=web-1.qcow2",
            "size=4096",
            "virtualsize=1073741824",
            "qcow2=true",
            "qcow2.filename=web-1.qcow2",
            "qcow2.size=4096",
            "qcow2.virtualsize=1073741824",
            "physicalSize=4096",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}: {text}");
        }
    }

    #[test]
    fn values_are_escaped() {
        assert_eq!(escaped("a b=c:d\\e"), "a\\ b\\=c\\:d\\\\e");
        assert_eq!(escaped("ü\n"), "\\u00fc\\u000a");
    }
}
