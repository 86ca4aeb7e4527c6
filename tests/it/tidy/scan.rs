//! Rust source as text: comments and literals blanked, tests cut out, paths and functions found.
//!
//! No parser: what it takes for code is good enough for sources that `rustfmt` and the compiler accept.

/// The source with comments, and the insides of strings and characters, replaced by blanks. Line breaks
/// stay, so that places keep their line numbers.
pub fn blanked(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = skipped(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// Where the comment or literal that begins at `at` ends; `at` if none begins there.
fn skipped(chars: &[char], at: usize) -> usize {
    let is = |index: usize, c: char| chars.get(index) == Some(&c);
    match chars[at] {
        '/' if is(at + 1, '/') => line_end(chars, at),
        '/' if is(at + 1, '*') => comment_end(chars, at),
        '"' => string_end(chars, at + 1),
        'r' if at == 0 || !is_word(chars[at - 1]) || is_byte_prefix(chars, at) => {
            let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
            if is(at + 1 + hashes, '"') { raw_end(chars, at + 2 + hashes, hashes) } else { at }
        }
        '\'' if is(at + 1, '\\') => {
            let close = chars[at + 3..].iter().position(|c| *c == '\'');
            close.map_or(chars.len(), |close| at + 4 + close)
        }
        '\'' if is(at + 2, '\'') => at + 3,
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `at` is the `r` of `br"` and not the end of a longer word.
fn is_byte_prefix(chars: &[char], at: usize) -> bool {
    chars[at - 1] == 'b' && (at == 1 || !is_word(chars[at - 2]))
}

fn line_end(chars: &[char], at: usize) -> usize {
    chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |length| at + length)
}

/// The end of a block comment; they nest.
fn comment_end(chars: &[char], at: usize) -> usize {
    let (mut depth, mut at) = (0, at);
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], from: usize) -> usize {
    let mut at = from;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_end(chars: &[char], from: usize, hashes: usize) -> usize {
    let closes = |at: usize| chars[at] == '"' && chars[at + 1..].iter().take(hashes).all(|c| *c == '#');
    (from..chars.len()).find(|at| closes(*at)).map_or(chars.len(), |at| at + 1 + hashes)
}

/// A source without what is compiled for tests only.
pub struct Product {
    /// The blanked source, the items under `#[cfg(test)]` blanked too.
    pub code: String,
    /// The files that hold modules under `#[cfg(test)]`: a path that is given, or the module's name.
    pub test_modules: Vec<String>,
}

/// Cuts the items under `#[cfg(test)]` out.
pub fn product(source: &str) -> Product {
    let mut code: Vec<char> = blanked(source).chars().collect();
    let original: Vec<char> = source.chars().collect();
    let mark: Vec<char> = "#[cfg(test)]".chars().collect();
    let mut test_modules = Vec::new();
    let mut from = 0;
    while let Some(found) = code[from..].windows(mark.len()).position(|window| window == mark) {
        let start = from + found;
        let end = item_end(&code, start + mark.len());
        if code[end - 1] == ';' {
            let item: String = original[start..end].iter().collect();
            let given = item.split("#[path = \"").nth(1).and_then(|rest| rest.split('"').next());
            let name = item.trim_end_matches(';').rsplit(' ').next().map(|name| format!("{name}.rs"));
            test_modules.extend(given.map(str::to_owned).or(name));
        }
        for c in code[start..end].iter_mut().filter(|c| **c != '\n') {
            *c = ' ';
        }
        from = end;
    }
    Product { code: code.into_iter().collect(), test_modules }
}

/// Where the item that begins at `from` ends: behind its block, or its semicolon.
fn item_end(code: &[char], from: usize) -> usize {
    let mut nesting = 0_usize;
    for (at, c) in code.iter().enumerate().skip(from) {
        match c {
            '(' | '[' | '{' => nesting += 1,
            ')' | ']' | '}' => {
                nesting = nesting.saturating_sub(1);
                if *c == '}' && nesting == 0 {
                    return at + 1;
                }
            }
            ';' if nesting == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// All paths that begin with `root`, groups taken apart: for `crate`, `use crate::a::{b, c::d}` gives
/// `[a, b]` and `[a, c, d]`.
pub fn paths(code: &str, root: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(&format!("{root}::")) {
        // The end of another word, or the middle of another path.
        if code[..at].ends_with(|c: char| is_word(c) || c == ':') {
            continue;
        }
        tree(&code[at + root.len() + 2..], &[], &mut found);
    }
    found
}

/// Reads one tree of paths, and gives what is left behind it.
fn tree<'a>(text: &'a str, above: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    let mut path = above.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(mut group) = rest.strip_prefix('{') {
            loop {
                group = group.trim_start().trim_start_matches(',').trim_start();
                if group.is_empty() || group.starts_with('}') {
                    return group.get(1..).unwrap_or_default();
                }
                let left = tree(group, &path, found);
                // What is no path (`as` names, attributes) is passed over.
                let next = left.find([',', '}']).unwrap_or(left.len());
                group = &left[next..];
            }
        }
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if end > 0 {
            path.push(rest[..end].to_owned());
        }
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(more) if end > 0 => rest = more,
            _ => break,
        }
    }
    found.push(path);
    rest
}

/// A function: where it begins, and how many lines it takes.
pub struct Function {
    /// Its name.
    pub name: String,
    /// The line of its `fn`, from 1.
    pub line: usize,
    /// Its lines, from there to its closing brace.
    pub lines: usize,
}

/// All functions with a body.
pub fn functions(code: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let name: String = code[at + 3..].chars().take_while(|c| is_word(*c)).collect();
        let body: Vec<char> = code[at..].chars().collect();
        let end = item_end(&body, 0);
        if name.is_empty() || body.get(end.wrapping_sub(1)) != Some(&'}') {
            continue;
        }
        let lines = body[..end].iter().filter(|c| **c == '\n').count() + 1;
        found.push(Function { name, line: line_of(code, at), lines });
    }
    found
}

/// The line of a byte offset, from 1.
pub fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

#[test]
fn comments_and_literals_are_blanked() {
    let source =
        "a // crate::x\n/* b /* c */ d */ e \"f \\\" g\" 'h' '\\'' '\\u{7f}' 'life r#\"i \" j\"# br\"k\" l";
    let words: Vec<_> = blanked(source).split_whitespace().map(str::to_owned).collect();
    assert_eq!(words, ["a", "e", "'life", "b", "l"]);
    assert_eq!(blanked(source).matches('\n').count(), 1);
}

#[test]
fn tests_are_cut_out() {
    let source = "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { \"}\" } }\nfn c() {}\n#[cfg(test)]\n#[path = \"x_tests.rs\"]\nmod tests;\n#[cfg(test)]\nmod testing;\nfn d() {}";
    let product = product(source);
    let names: Vec<_> = functions(&product.code).into_iter().map(|function| function.name).collect();
    assert_eq!(names, ["a", "c", "d"]);
    assert_eq!(product.test_modules, ["x_tests.rs", "testing.rs"]);
}

#[test]
fn paths_are_taken_apart() {
    let code =
        "use crate::{a, b::{c as d, e::*}}; use mycrate::f; let x: crate::g::H<crate::i>; pub(crate) j";
    let found: Vec<_> = paths(code, "crate").iter().map(|path| path.join(".")).collect();
    assert_eq!(found, ["a", "b.c", "b.e", "g.H", "i"]);
}

#[test]
fn functions_are_measured() {
    let code = "trait T { fn a(&self); fn b(&self) -> [u8; 2] {\n\n} }\nfn c<F: Fn() -> u8>(f: fn(u8))\nwhere F: X,\n{\n if x { }\n}\n";
    let found: Vec<_> = functions(code).into_iter().map(|f| (f.name, f.line, f.lines)).collect();
    assert_eq!(found, [("b".to_owned(), 1, 3), ("c".to_owned(), 4, 5)]);
}
