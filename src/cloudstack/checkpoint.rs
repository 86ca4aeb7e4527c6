//! Libvirt's checkpoint files: who is the parent, read and changed without touching any other byte.
//!
//! A file under `checkpoints/` is the XML of one `<domaincheckpoint>`. Its `<name>` is the snapshot's file
//! name; `<parent><name>` names the checkpoint below and is missing in the lowest. libvirt refuses to
//! redefine a checkpoint whose parent is not defined, so a merge has to change the parent's name, or take
//! the element out (measured with libvirt 11.3: both are accepted, and the next increment succeeds).
//!
//! The agent rewrites other parts of these files, and libvirt may come to write more, so an edit is a splice
//! at the XML parser's byte offsets and everything else stays byte for byte. The whole file must be well
//! formed. Document types are refused: they can change what the text means.

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::{BytesRef, BytesStart, Event};

use crate::failure::{Code, Failure, Kind};

/// The longest file that is read, in bytes. Real ones are a few KiB.
pub const MAX_BYTES: usize = 4 << 20;

/// How deep elements may nest. Real files have about a dozen levels (a domain's XML).
const MAX_DEPTH: usize = 256;

/// Why a checkpoint file cannot be read or changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// Longer than [`MAX_BYTES`].
    #[error("checkpoint file of {length} bytes is too long")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// No well-formed XML, or XML with features that are refused.
    #[error("checkpoint file is no XML that can be edited safely: {detail} at byte {offset}")]
    Xml {
        /// What is wrong.
        detail: String,
        /// Where the parser stopped, in bytes.
        offset: usize,
    },
    /// XML, but not of one `<domaincheckpoint>` with one name and at most one parent.
    #[error("checkpoint file is not as libvirt writes it: {detail}")]
    Shape {
        /// What is wrong.
        detail: &'static str,
    },
    /// The new parent's name cannot stand in XML.
    #[error("{name:?} cannot be a checkpoint's name")]
    BadName {
        /// The name.
        name: String,
    },
}

impl Failure for CheckpointError {
    fn kind(&self) -> Kind {
        Kind::Refused
    }

    fn code(&self) -> Code {
        Code::CheckpointUnreadable
    }
}

/// What a checkpoint file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its name: the snapshot's file name.
    pub name: String,
    /// The name of the checkpoint below, if there is one.
    pub parent: Option<String>,
}

impl Checkpoint {
    /// Reads a checkpoint file.
    pub fn parse(xml: &[u8]) -> Result<Self, CheckpointError> {
        scan(xml).map(|places| places.checkpoint)
    }
}

/// The file with another parent, or with none.
///
/// With a name only the text of `<parent><name>` changes (comments inside it stay); if there is no parent so
/// far, a `<parent>` element follows the `<name>`. Without one the `<parent>` element goes, and the white space before it. Nothing to
/// change gives the same bytes, so that an edit can be repeated. The result was read again and says what
/// was asked for.
pub fn set_parent(xml: &[u8], parent: Option<&str>) -> Result<Vec<u8>, CheckpointError> {
    let places = scan(xml)?;
    if places.checkpoint.parent.as_deref() == parent {
        return Ok(xml.to_vec());
    }
    let edited = match parent {
        None => splice(xml, &[places.parent_element], b""),
        Some(name) => {
            let allowed = !name.is_empty() && name.trim() == name && !name.chars().any(char::is_control);
            if !allowed {
                return Err(CheckpointError::BadName { name: name.to_owned() });
            }
            let name = quick_xml::escape::escape(name);
            if places.parent_name.is_empty() {
                let element = format!("<parent><name>{name}</name></parent>");
                let behind_name = Range { start: places.name_end, end: places.name_end };
                splice(xml, &[behind_name], element.as_bytes())
            } else {
                splice(xml, &places.parent_name, name.as_bytes())
            }
        }
    };
    let wanted = Checkpoint { name: places.checkpoint.name, parent: parent.map(str::to_owned) };
    if Checkpoint::parse(&edited)? != wanted {
        return Err(CheckpointError::Shape { detail: "the edit does not read back as it was meant" });
    }
    Ok(edited)
}

/// `xml` without the ranges, which go up, and with `text` in the place of the first.
fn splice(xml: &[u8], ranges: &[Range<usize>], text: &[u8]) -> Vec<u8> {
    let mut edited = Vec::with_capacity(xml.len() + text.len());
    let mut copied = 0;
    for (index, range) in ranges.iter().enumerate() {
        edited.extend_from_slice(xml.get(copied..range.start).unwrap_or_default());
        if index == 0 {
            edited.extend_from_slice(text);
        }
        copied = range.end;
    }
    edited.extend_from_slice(xml.get(copied..).unwrap_or_default());
    edited
}

/// What a file says, and where.
struct Places {
    checkpoint: Checkpoint,
    /// Where the `<name>` element ends.
    name_end: usize,
    /// The `<parent>` element and the white space before it; empty if there is none.
    parent_element: Range<usize>,
    /// The pieces of text in `<parent><name>`, in order.
    parent_name: Vec<Range<usize>>,
}

/// Which element the reader is in; all others are just counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// No element that matters.
    Other,
    /// `/domaincheckpoint/name`.
    Name,
    /// `/domaincheckpoint/parent`.
    Parent,
    /// `/domaincheckpoint/parent/name`.
    ParentName,
}

/// What one walk through the file has found so far.
#[derive(Default)]
struct Scan {
    depth: usize,
    /// The elements of interest that are open, each with its depth.
    open: Vec<(usize, Inside)>,
    roots: usize,
    name: Option<String>,
    name_end: usize,
    parent_name: Option<String>,
    name_pieces: Vec<Range<usize>>,
    parent: Option<Range<usize>>,
}

fn scan(xml: &[u8]) -> Result<Places, CheckpointError> {
    if xml.len() > MAX_BYTES {
        return Err(CheckpointError::TooLong { length: xml.len() });
    }
    let text = std::str::from_utf8(xml).map_err(|error| CheckpointError::Xml {
        detail: "a byte that is not UTF-8".to_owned(),
        offset: error.valid_up_to(),
    })?;
    // The parser leaves a byte order mark out of its offsets.
    let mark = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
    let body = text.get(mark..).unwrap_or_default();
    if body.starts_with('\u{feff}') {
        let detail = "a second byte order mark".to_owned();
        return Err(CheckpointError::Xml { detail, offset: mark });
    }
    let mut reader = Reader::from_str(body);
    reader.config_mut().check_comments = true;
    let mut scan = Scan::default();
    loop {
        let start = mark + position(&reader);
        let event = reader
            .read_event()
            .map_err(|error| CheckpointError::Xml { detail: error.to_string(), offset: start })?;
        let place = start..mark + position(&reader);
        if event == Event::Eof {
            return scan.finish(xml);
        }
        scan.take(&event, place).map_err(|detail| CheckpointError::Xml { detail, offset: start })?;
    }
}

/// How many bytes of the text the reader has taken.
fn position(reader: &Reader<&[u8]>) -> usize {
    usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX)
}

impl Scan {
    fn take(&mut self, event: &Event<'_>, span: Range<usize>) -> Result<(), String> {
        match event {
            Event::Start(element) => self.enter(element, &span)?,
            Event::Empty(element) => {
                self.enter(element, &span)?;
                self.leave(&span);
            }
            Event::End(_) => self.leave(&span),
            Event::Text(text) => self.text(text, span)?,
            Event::CData(data) => self.text(data, span)?,
            Event::GeneralRef(entity) => match resolved(entity) {
                Some(text) => self.text(&text, span)?,
                None => return Err("an entity that XML does not define".to_owned()),
            },
            Event::DocType(_) => return Err("a document type".to_owned()),
            Event::Decl(declaration) => match declaration.encoding() {
                // Anything else would make the bytes of a new name mean other characters.
                Some(Ok(name)) if !name.eq_ignore_ascii_case("UTF-8") => {
                    return Err("an encoding other than UTF-8".to_owned());
                }
                Some(Err(error)) => return Err(error.to_string()),
                Some(Ok(_)) | None => {}
            },
            Event::PI(_) | Event::Comment(_) | Event::Eof => {}
        }
        Ok(())
    }

    fn inside(&self) -> Inside {
        match self.open.last() {
            Some((depth, inside)) if *depth == self.depth => *inside,
            _ => Inside::Other,
        }
    }

    fn enter(&mut self, element: &BytesStart<'_>, span: &Range<usize>) -> Result<(), String> {
        let parent = self.inside();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("elements nested too deep".to_owned());
        }
        // Without the search for duplicates, which takes quadratic time in what a hostile file may hold.
        if let Some(bad) = element.attributes().with_checks(false).find_map(Result::err) {
            return Err(bad.to_string());
        }
        let name = element.name();
        let name: &[u8] = name.as_ref().as_ref();
        let inside = match (self.depth, name, parent) {
            (1, b"domaincheckpoint", _) if self.roots == 0 => {
                self.roots = 1;
                return Ok(());
            }
            (1, ..) => return Err("another element than one <domaincheckpoint>".to_owned()),
            (2, b"name", _) => Inside::Name,
            (2, b"parent", _) => Inside::Parent,
            (3, b"name", Inside::Parent) => Inside::ParentName,
            (_, _, Inside::Name | Inside::ParentName) => {
                return Err("an element inside a name".to_owned());
            }
            _ => return Ok(()),
        };
        let first = match inside {
            Inside::Name => self.name.replace(String::new()).is_none(),
            Inside::Parent => self.parent.replace(span.start..span.end).is_none(),
            Inside::ParentName => self.parent_name.replace(String::new()).is_none(),
            Inside::Other => true,
        };
        if !first {
            return Err("a name or parent given twice".to_owned());
        }
        self.open.push((self.depth, inside));
        Ok(())
    }

    fn leave(&mut self, span: &Range<usize>) {
        if self.inside() == Inside::Parent
            && let Some(parent) = &mut self.parent
        {
            parent.end = span.end;
        }
        if self.inside() == Inside::Name {
            self.name_end = span.end;
        }
        if self.open.last().is_some_and(|(depth, _)| *depth == self.depth) {
            self.open.pop();
        }
        self.depth = self.depth.saturating_sub(1);
    }

    fn text(&mut self, text: &str, span: Range<usize>) -> Result<(), String> {
        if self.depth == 0 && !text.bytes().all(is_space) {
            return Err("text outside the element".to_owned());
        }
        match self.inside() {
            Inside::Name => self.name.get_or_insert_default().push_str(text),
            Inside::ParentName => {
                self.parent_name.get_or_insert_default().push_str(text);
                self.name_pieces.push(span);
            }
            Inside::Parent | Inside::Other => {}
        }
        Ok(())
    }

    fn finish(self, xml: &[u8]) -> Result<Places, CheckpointError> {
        let shape = |detail| CheckpointError::Shape { detail };
        if self.depth > 0 || self.roots == 0 {
            return Err(shape("it ends before its <domaincheckpoint> does"));
        }
        let name = self.name.map(|name| trimmed(&name)).filter(|name| !name.is_empty());
        let name = name.ok_or(shape("it has no <name>"))?;
        let parent = self.parent_name.map(|name| trimmed(&name)).filter(|name| !name.is_empty());
        if self.parent.is_some() && parent.is_none() {
            return Err(shape("its <parent> has no <name>"));
        }
        let mut parent_element = self.parent.unwrap_or_default();
        let space_at = |index: usize| xml.get(index).copied().is_some_and(is_space);
        while parent_element.start > 0 && space_at(parent_element.start - 1) {
            parent_element.start -= 1;
        }
        let checkpoint = Checkpoint { name, parent };
        let (name_end, parent_name) = (self.name_end, self.name_pieces);
        Ok(Places { checkpoint, name_end, parent_element, parent_name })
    }
}

/// The text of one of XML's own entities or of a character reference.
fn resolved(entity: &BytesRef<'_>) -> Option<String> {
    if let Ok(Some(character)) = entity.resolve_char_ref() {
        return Some(character.to_string());
    }
    quick_xml::escape::resolve_xml_entity(entity).map(str::to_owned)
}

/// White space as XML knows it.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn trimmed(text: &str) -> String {
    text.trim_matches([' ', '\t', '\r', '\n']).to_owned()
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
