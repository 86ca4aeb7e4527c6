//! Replies as they come from a server that is not trusted: no length of theirs is believed before it was held
//! against what the protocol allows.

use std::io::{self, Read};

use nfs3_client::nfs3_types::mount::mountstat3;
use nfs3_client::nfs3_types::nfs3::{Nfs3Option, cookieverf3, fattr3, nfs_fh3, wcc_data};
use nfs3_client::nfs3_types::xdr_codec::{Error, Opaque, Result, Unpack};

/// The longest handle (`NFS3_FHSIZE`).
const MAX_HANDLE_BYTES: usize = 64;
/// The longest name that is taken from a directory; longer ones are no protocol of anybody's.
const MAX_NAME_BYTES: usize = 4096;
/// The most bytes of a file in one reply.
pub(super) const MAX_DATA_BYTES: usize = 1 << 20;
/// The most flavours of authentication that a mount may list.
const MAX_FLAVOURS: u32 = 256;

/// Bytes with their length before them, at most `most`.
fn bytes(input: &mut impl Read, most: usize) -> Result<(Vec<u8>, usize)> {
    let (length, head) = u32::unpack(input)?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > most {
        return Err(Error::InvalidLength(length));
    }
    // Not zeroed before: data is most of what comes.
    let mut data = Vec::with_capacity(length);
    if Read::take(&mut *input, length as u64).read_to_end(&mut data)? != length {
        return Err(Error::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    let padding = length.next_multiple_of(4) - length;
    input.read_exact(&mut [0; 3][..padding])?;
    Ok((data, head + length + padding))
}

fn handle(input: &mut impl Read) -> Result<(nfs_fh3, usize)> {
    let (data, taken) = bytes(input, MAX_HANDLE_BYTES)?;
    Ok((nfs_fh3 { data: Opaque::owned(data) }, taken))
}

fn handle_if_any(input: &mut impl Read) -> Result<(Option<nfs_fh3>, usize)> {
    let (there, first) = bool::unpack(input)?;
    if !there {
        return Ok((None, first));
    }
    let (handle, second) = handle(input)?;
    Ok((Some(handle), first + second))
}

fn attributes(input: &mut impl Read) -> Result<(Option<fattr3>, usize)> {
    let (found, taken) = Nfs3Option::<fattr3>::unpack(input)?;
    let found = match found {
        Nfs3Option::Some(attributes) => Some(attributes),
        Nfs3Option::None => None,
    };
    Ok((found, taken))
}

/// What LOOKUP found.
#[derive(Debug)]
pub(super) struct Looked {
    pub handle: nfs_fh3,
    pub attributes: Option<fattr3>,
}

impl Unpack for Looked {
    fn unpack(input: &mut impl Read) -> Result<(Self, usize)> {
        let (handle, first) = handle(input)?;
        let (attributes, second) = attributes(input)?;
        let (_, third) = Nfs3Option::<fattr3>::unpack(input)?;
        Ok((Self { handle, attributes }, first + second + third))
    }
}

/// What CREATE or MKDIR made; servers may leave out both.
#[derive(Debug)]
pub(super) struct Made {
    pub handle: Option<nfs_fh3>,
    pub attributes: Option<fattr3>,
}

impl Unpack for Made {
    fn unpack(input: &mut impl Read) -> Result<(Self, usize)> {
        let (handle, first) = handle_if_any(input)?;
        let (attributes, second) = attributes(input)?;
        let (_, third) = wcc_data::unpack(input)?;
        Ok((Self { handle, attributes }, first + second + third))
    }
}

/// What READ gave.
#[derive(Debug)]
pub(super) struct Data {
    pub eof: bool,
    pub data: Vec<u8>,
}

impl Unpack for Data {
    fn unpack(input: &mut impl Read) -> Result<(Self, usize)> {
        let (_, first) = Nfs3Option::<fattr3>::unpack(input)?;
        let (count, second) = u32::unpack(input)?;
        let (eof, third) = bool::unpack(input)?;
        let (data, fourth) = bytes(input, MAX_DATA_BYTES)?;
        if usize::try_from(count).ok() != Some(data.len()) {
            return Err(Error::InvalidLength(data.len()));
        }
        Ok((Self { eof, data }, first + second + third + fourth))
    }
}

/// One name of a directory.
#[derive(Debug)]
pub(super) struct Name {
    pub text: Vec<u8>,
    pub cookie: u64,
    pub attributes: Option<fattr3>,
    pub handle: Option<nfs_fh3>,
}

/// What READDIRPLUS gave. Its names are bounded by the record that they came in.
#[derive(Debug)]
pub(super) struct Page {
    pub verifier: cookieverf3,
    pub names: Vec<Name>,
    pub eof: bool,
}

/// What READDIR gave: names with their cookies, and nothing else.
#[derive(Debug)]
pub(super) struct PlainPage(pub Page);

impl Unpack for Page {
    fn unpack(input: &mut impl Read) -> Result<(Self, usize)> {
        page(input, |input| {
            let (attributes, first) = attributes(input)?;
            let (handle, second) = handle_if_any(input)?;
            Ok(((attributes, handle), first + second))
        })
    }
}

impl Unpack for PlainPage {
    fn unpack(input: &mut impl Read) -> Result<(Self, usize)> {
        page(input, |_| Ok(((None, None), 0))).map(|(page, taken)| (Self(page), taken))
    }
}

/// What may be told of a name.
type Told = (Option<fattr3>, Option<nfs_fh3>);

/// A page; `told` reads what stands behind each cookie.
fn page<R: Read>(input: &mut R, told: impl Fn(&mut R) -> Result<(Told, usize)>) -> Result<(Page, usize)> {
    let (_, mut taken) = Nfs3Option::<fattr3>::unpack(input)?;
    let (verifier, length) = cookieverf3::unpack(input)?;
    taken += length;
    let mut names = Vec::new();
    loop {
        let (more, length) = bool::unpack(input)?;
        taken += length;
        if !more {
            break;
        }
        let (_, length) = u64::unpack(input)?;
        taken += length;
        let (text, length) = bytes(input, MAX_NAME_BYTES)?;
        taken += length;
        let (cookie, length) = u64::unpack(input)?;
        taken += length;
        let ((attributes, handle), length) = told(input)?;
        taken += length;
        names.push(Name { text, cookie, attributes, handle });
    }
    let (eof, length) = bool::unpack(input)?;
    Ok((Page { verifier, names, eof }, taken + length))
}

/// What MNT answered.
#[derive(Debug)]
pub(super) enum Mounted {
    Root(nfs_fh3),
    Refused(mountstat3),
}

impl Unpack for Mounted {
    fn unpack(input: &mut impl Read) -> Result<(Self, usize)> {
        let (status, mut taken) = mountstat3::unpack(input)?;
        if !matches!(status, mountstat3::MNT3_OK) {
            return Ok((Self::Refused(status), taken));
        }
        let (root, length) = handle(input)?;
        let (flavours, head) = u32::unpack(input)?;
        taken += length + head;
        if flavours > MAX_FLAVOURS {
            return Err(Error::InvalidLength(usize::try_from(flavours).unwrap_or(usize::MAX)));
        }
        for _ in 0..flavours {
            taken += u32::unpack(input)?.1;
        }
        Ok((Self::Root(root), taken))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use nfs3_client::nfs3_types::nfs3::{
        CREATE3resok, Nfs3Option, READ3resok, READDIRPLUS3resok, cookieverf3, dirlistplus3, entryplus3,
        fattr3, nfs_fh3, wcc_data,
    };
    use nfs3_client::nfs3_types::xdr_codec::{List, Opaque, Pack, Unpack};

    use super::{Data, Made, Mounted, Page};

    fn packed(value: &impl Pack) -> Vec<u8> {
        let mut bytes = Vec::new();
        value.pack(&mut bytes).unwrap();
        bytes
    }

    fn read(data: &'static [u8], count: u32) -> Vec<u8> {
        let data = Opaque::borrowed(data);
        packed(&READ3resok { file_attributes: Nfs3Option::None, count, eof: true, data })
    }

    #[test]
    fn data_is_as_long_as_it_says() {
        let bytes = read(b"hello", 5);
        let (reply, taken) = Data::unpack(&mut Cursor::new(&bytes)).unwrap();
        assert_eq!((reply.data.as_slice(), reply.eof, taken), (&b"hello"[..], true, bytes.len()));
        assert!(Data::unpack(&mut Cursor::new(read(b"hello", 6))).is_err());
        let mut huge = read(b"hello", 5);
        huge[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(Data::unpack(&mut Cursor::new(huge)).is_err());
        assert!(Data::unpack(&mut Cursor::new(&bytes[..bytes.len() - 1])).is_err());
    }

    #[test]
    fn pages_of_names() {
        let entry = |name: &'static [u8], cookie, plus| entryplus3 {
            fileid: 1,
            name: name.into(),
            cookie,
            name_attributes: if plus { Nfs3Option::Some(sample()) } else { Nfs3Option::None },
            name_handle: if plus {
                Nfs3Option::Some(nfs_fh3 { data: Opaque::borrowed(b"handle") })
            } else {
                Nfs3Option::None
            },
        };
        let page = READDIRPLUS3resok {
            dir_attributes: Nfs3Option::Some(sample()),
            cookieverf: cookieverf3([7; 8]),
            reply: dirlistplus3 {
                entries: List(vec![entry(b"a", 3, true), entry(b"long name", 4, false)]),
                eof: true,
            },
        };
        let bytes = packed(&page);
        let (page, taken) = Page::unpack(&mut Cursor::new(&bytes)).unwrap();
        assert_eq!((taken, page.eof, page.verifier.0), (bytes.len(), true, [7; 8]));
        assert_eq!(page.names[0].handle.as_ref().unwrap().data.as_ref(), b"handle");
        assert!(page.names[1].attributes.is_none() && page.names[1].handle.is_none());
        assert_eq!((page.names[1].text.as_slice(), page.names[1].cookie), (&b"long name"[..], 4));
    }

    #[test]
    fn what_was_made_may_be_told_or_not() {
        let wcc = || wcc_data { before: Nfs3Option::None, after: Nfs3Option::Some(sample()) };
        let handle = |length| Nfs3Option::Some(nfs_fh3 { data: Opaque::owned(vec![7; length]) });
        let told = |obj, obj_attributes| packed(&CREATE3resok { obj, obj_attributes, dir_wcc: wcc() });
        let bytes = told(handle(64), Nfs3Option::Some(sample()));
        let (made, taken) = Made::unpack(&mut Cursor::new(&bytes)).unwrap();
        assert_eq!((made.handle.unwrap().data.len(), taken), (64, bytes.len()));
        assert_eq!(made.attributes.unwrap().fileid, sample().fileid);
        let bytes = told(Nfs3Option::None, Nfs3Option::None);
        let (made, taken) = Made::unpack(&mut Cursor::new(&bytes)).unwrap();
        assert!(made.handle.is_none() && made.attributes.is_none() && taken == bytes.len());
        assert!(Made::unpack(&mut Cursor::new(told(handle(65), Nfs3Option::None))).is_err());
    }

    #[test]
    fn a_long_handle_is_refused() {
        for (length, fits) in [(0, true), (64, true), (65, false), (u32::MAX, false)] {
            let mut bytes = vec![0, 0, 0, 0];
            bytes.extend(length.to_be_bytes());
            bytes.extend(vec![1; usize::try_from(length.min(64)).unwrap()]);
            // No flavours.
            bytes.extend([0; 4]);
            assert_eq!(Mounted::unpack(&mut Cursor::new(&bytes)).is_ok(), fits, "{length}");
        }
        let mut flavours = vec![0; 8];
        flavours.extend(u32::MAX.to_be_bytes());
        assert!(Mounted::unpack(&mut Cursor::new(&flavours)).is_err());
    }

    fn sample() -> fattr3 {
        fattr3::unpack(&mut Cursor::new([[0, 0, 0, 1]; 21].concat())).unwrap().0
    }
}
