//! What of an image a request wants, by its headers (RFC 9110, sections 13 and 14). Pure.

use std::ops::Range;

use axum::http::{HeaderMap, header};

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All of it: 200.
    Whole,
    /// One part of it, not empty: 206.
    Part(Range<u64>),
    /// Nothing, as the client has it: 304.
    Unchanged,
    /// Nothing, as there is no such part: 416.
    Unsatisfiable,
}

/// What `headers` want of an image of that length. `tag` is its strong validator, with its quotes; without one no
/// condition is met, so that parts of two versions are never put together.
pub fn wanted(headers: &HeaderMap, length: u64, tag: Option<&str>) -> Wanted {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    if let Some(list) = text(header::IF_NONE_MATCH) {
        let same = |one: &str| Some(one.trim().trim_start_matches("W/")) == tag;
        if list == "*" || list.split(',').any(same) {
            return Wanted::Unchanged;
        }
    }
    let Some(range) = text(header::RANGE) else { return Wanted::Whole };
    // A date, or a weak tag, never says that all bytes are the same.
    if headers.contains_key(header::IF_RANGE) && (tag.is_none() || text(header::IF_RANGE) != tag) {
        return Wanted::Whole;
    }
    part(range, length)
}

/// One range; several, and what is none, may be taken for none.
fn part(text: &str, length: u64) -> Wanted {
    let bytes = text.split_once('=').filter(|(unit, _)| unit.eq_ignore_ascii_case("bytes"));
    let Some((first, last)) = bytes.and_then(|(_, range)| range.trim().split_once('-')) else {
        return Wanted::Whole;
    };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // More than there can be is as much as there is.
        digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
    };
    let range = match (number(first), number(last)) {
        (None, Some(count)) if first.is_empty() => length.saturating_sub(count)..length,
        (Some(first), None) if last.is_empty() => first..length,
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(length),
        _ => return Wanted::Whole,
    };
    if range.is_empty() { Wanted::Unsatisfiable } else { Wanted::Part(range) }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, HeaderName, HeaderValue};

    use super::{Wanted, wanted};

    fn of(lines: &[(&str, &str)], tag: Option<&str>) -> Wanted {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.insert(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        wanted(&headers, 100, tag)
    }

    #[test]
    fn ranges() {
        for (text, is) in [
            ("bytes=0-0", Wanted::Part(0..1)),
            ("bytes=5-", Wanted::Part(5..100)),
            ("BYTES=5-1000", Wanted::Part(5..100)),
            ("bytes=99-99999999999999999999999999", Wanted::Part(99..100)),
            ("bytes=-7", Wanted::Part(93..100)),
            ("bytes=-1000", Wanted::Part(0..100)),
            ("bytes=100-", Wanted::Unsatisfiable),
            ("bytes=-0", Wanted::Unsatisfiable),
            ("bytes=200-300", Wanted::Unsatisfiable),
            ("bytes=7-5", Wanted::Whole),
            ("bytes=0-1,5-6", Wanted::Whole),
            ("bytes=", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("lines=0-1", Wanted::Whole),
        ] {
            assert_eq!(of(&[("range", text)], None), is, "{text}");
        }
    }

    #[test]
    fn conditions_hold_by_the_strong_tag_alone() {
        let range = ("range", "bytes=1-2");
        let tag = Some("\"x\"");
        assert_eq!(of(&[range, ("if-range", "\"x\"")], tag), Wanted::Part(1..3));
        for other in ["\"y\"", "W/\"x\"", "Mon, 23 Nov 2026 00:00:00 GMT"] {
            assert_eq!(of(&[range, ("if-range", other)], tag), Wanted::Whole, "{other}");
        }
        assert_eq!(of(&[range, ("if-range", "\"x\"")], None), Wanted::Whole);
        for same in ["\"x\"", "W/\"x\"", "\"a\", \"x\"", "*"] {
            assert_eq!(of(&[range, ("if-none-match", same)], tag), Wanted::Unchanged, "{same}");
        }
        assert_eq!(of(&[("if-none-match", "\"a\"")], tag), Wanted::Whole);
        assert_eq!(of(&[("if-none-match", "\"a\"")], None), Wanted::Whole);
    }
}
