//! The page at `/`: plain modules and a style sheet in the binary, which use the API as anybody else does.
//!
//! The files hold nothing of a store, so they need no token; what the page shows comes by the token that is entered
//! there and stays in that tab. Nothing is loaded from elsewhere, and the policy that is sent with each file keeps it so.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use super::problem::Problem;

/// What the page may do: run and show its own files, talk to this service, be in no frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Name, content type, content.
type File = (&'static str, &'static str, &'static str);

static INDEX: File = ("index.html", "text/html; charset=utf-8", include_str!("index.html"));

/// What is given at `/page/NAME`.
static FILES: [File; 7] = [
    ("style.css", "text/css; charset=utf-8", include_str!("style.css")),
    ("api.js", SCRIPT, include_str!("api.js")),
    ("chains.js", SCRIPT, include_str!("chains.js")),
    ("detail.js", SCRIPT, include_str!("detail.js")),
    ("format.js", SCRIPT, include_str!("format.js")),
    ("jobs.js", SCRIPT, include_str!("jobs.js")),
    ("main.js", SCRIPT, include_str!("main.js")),
];

/// The page itself.
pub fn index(asked: &HeaderMap) -> Response {
    answer(&INDEX, asked)
}

/// A file of the page; 404 if it has none of that name.
pub fn file(name: &str, asked: &HeaderMap) -> Result<Response, Problem> {
    let found = FILES.iter().find(|file| file.0 == name);
    found.map(|file| answer(file, asked)).ok_or_else(|| Problem::not_found("the page has no such file"))
}

/// The file, or 304 if who asks has it as it is.
fn answer((_, kind, content): &File, asked: &HeaderMap) -> Response {
    let tag = format!("\"{}\"", blake3::hash(content.as_bytes()).to_hex());
    let known = asked.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let fresh = known.flat_map(|value| value.split(',')).any(|one| {
        let one = one.trim();
        one == "*" || one.trim_start_matches("W/") == tag
    });
    let mut response =
        if fresh { StatusCode::NOT_MODIFIED.into_response() } else { (*content).into_response() };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, *kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Kept, but asked for each time: after an update of the service the old page must not stay.
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::{FILES, INDEX};

    /// Whoever adds a file and forgets it here would see it missing only in a browser.
    #[test]
    fn every_file_that_is_named_is_given_and_none_is_from_elsewhere() {
        for (name, _, content) in FILES.iter().chain([&INDEX]) {
            let words = content.split(['"', '\'']);
            let named =
                words.filter_map(|word| word.strip_prefix("/page/").or_else(|| word.strip_prefix("./")));
            for file in named {
                assert!(FILES.iter().any(|one| one.0 == file), "{name} wants {file}");
            }
            assert!(
                !content.contains("//cdn") && !content.contains("http:") && !content.contains("https:"),
                "{name}"
            );
        }
    }
}
