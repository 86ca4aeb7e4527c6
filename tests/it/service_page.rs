//! The page, in a real browser: what it shows, a delete from the plan to its end, by keyboard, narrow and dark.

use serde_json::{Value, json};

use super::support::browser::{Browser, ENTER, ESCAPE, RIGHT, SPACE};
use super::support::service::{OPERATE, READ, Served, configure, same, write_rows};
use super::support::world::World;

const LONG_NAMES: [&str; 5] = [
    "1f0a7f5e-4a25-4b86-93ce-6a70f0f0c001",
    "2b1d9c3a-8a11-4d2c-b0de-6a70f0f0c002",
    "3c2eab49-17f4-4e0b-8b7b-6a70f0f0c003",
    "4d3fbc58-26e3-4f9a-9c6a-6a70f0f0c004",
    "5e40cd67-35d2-40b9-8d59-6a70f0f0c005",
];

/// a <- b <- {c, d}, where c and below are adopted; a chain of five, of which one is leaving; one without its parent.
fn world() -> World {
    let world = World::forked();
    for (at, name) in LONG_NAMES.into_iter().enumerate() {
        let below = at.checked_sub(1).map_or("", |below| LONG_NAMES[below]);
        let write = format!("write -P {} {}M {}k", at + 1, at, if at == 0 { 6144 } else { 640 });
        world.make(name, below, &[&write]);
    }
    world.make("orphan", "nowhere", &[]);
    assert_eq!(world.run(&["init"]).0, 0);
    assert_eq!(world.run(&["adopt", "c", "--now"]).0, 0);
    assert_eq!(world.run(&["verify", "c", "--level", "data"]).0, 0);
    let leave = ["delete", LONG_NAMES[2], "--assume-deleted", "--now", "--yes", "--grace", "1h"];
    let (exit, document) = world.run(&leave);
    assert_eq!(exit, 0, "{document}");
    world
}

fn member(name: &str) -> String {
    format!(".member[data-member='snapshots/2/7/{name}']")
}

/// Nothing is cut off at the side, at the widths and in the colours that people have; a picture of each.
fn pictures(browser: &Browser, name: &str) {
    for (width, dark) in [(1280, false), (1280, true), (400, true), (400, false)] {
        browser.look(width, dark);
        let colours = if dark { "dark" } else { "light" };
        let wide = browser.run("return document.documentElement.scrollWidth");
        assert!(wide.as_u64().unwrap() <= u64::from(width), "{name}, {width}: {wide} wide");
        browser.picture(&format!("{name}-{width}-{colours}"));
    }
}

#[test]
fn a_delete_is_planned_confirmed_and_watched_by_keyboard() {
    let world = world();
    let truth = world.directory.path().join("truth");
    super::support::qemu::must(
        "qemu-img",
        &["convert", "-O", "raw", world.member("c").to_str().unwrap(), truth.to_str().unwrap()],
    );
    configure(&world, "");
    let served = Served::start(&world);
    let browser = Browser::start();
    browser.look(1280, false);
    browser.open(&format!("http://{}/", served.address));
    browser.wait("document.activeElement.id === 'token'");
    pictures(&browser, "token");
    // A token that is not known is refused in words, and can be given again.
    browser.keys(&format!("wrong-token-0123456789{ENTER}"));
    browser.wait("document.getElementById('refused').textContent.includes('not known')");
    assert!(browser.complaints().iter().all(|line| line.contains("401")), "only the refusal");
    browser.keys(&format!("{OPERATE}{ENTER}"));
    browser.wait("document.querySelectorAll('.chain').length === 3");
    browser.wait("document.getElementById('health').dataset.state === 'good'");
    let kind = |name: &str| {
        browser.run(&format!("return document.querySelector(\"{}\").dataset.kind", member(name)))
    };
    assert_eq!(
        ["a", LONG_NAMES[2], LONG_NAMES[3], "orphan"].map(kind),
        ["settled", "leaving", "settled", "damaged"].map(Value::from)
    );
    let totals = browser.run("return document.getElementById('totals').innerText");
    let totals = totals.as_str().unwrap();
    assert!(totals.contains("Held by deleted members") && totals.contains("not adopted"), "{totals}");
    pictures(&browser, "chains");
    // From member to member with the arrows; the detail has its facts and its map.
    browser.look(1280, false);
    browser.tab_to(&member("a"));
    browser.keys(RIGHT);
    browser.keys(ENTER);
    browser.wait("document.activeElement.id === 'detail-title'");
    browser.wait("document.querySelector('#facts canvas') && /last checked\\s+the oldest/.test(document.getElementById('facts').innerText)");
    assert!(
        browser
            .run("return document.getElementById('detail-title').textContent")
            .as_str()
            .unwrap()
            .ends_with("/b")
    );
    // The plan is shown and nothing is done; then it is confirmed, and ends.
    browser.tab_to("#sure");
    browser.keys(SPACE);
    browser.tab_to("#facts form button");
    browser.keys(ENTER);
    browser.wait("document.getElementById('confirm')");
    let plan = browser.run("return document.getElementById('plan').innerText");
    assert!(plan.as_str().unwrap().contains("b into c"), "{plan}");
    assert_eq!(served.get("/v1/jobs").is(200)["jobs"], json!([]), "a plan makes no job");
    pictures(&browser, "plan");
    browser.tab_to("#confirm");
    browser.keys(ENTER);
    browser.wait("document.querySelector('.job[data-state=done]')");
    browser.wait(&format!("!document.querySelector(\"{}\")", member("b")));
    pictures(&browser, "done");
    let jobs = served.get("/v1/jobs").is(200);
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 1, "{jobs}");
    same(&world.member("c"), &truth);
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// The rows of the members of [`world`]: c is hidden but the newest, the second of the long chain is hidden, the third
/// destroyed and leaving.
fn hide(world: &World) -> std::path::PathBuf {
    let mut rows = vec![("a", "Ready"), ("b", "Ready"), ("c", "Hidden")];
    rows.extend(LONG_NAMES.into_iter().zip(["Ready", "Hidden", "Destroyed", "Ready", "Allocated"]));
    write_rows(world, &rows)
}

#[test]
fn what_cloudstack_deleted_is_drawn_and_weighed() {
    let world = world();
    let rows = hide(&world);
    configure(&world, &format!("[schedule]\nrecords = {rows:?}\n"));
    let listed = std::process::Command::new(env!("CARGO_BIN_EXE_qchain"))
        .arg("--config")
        .arg(world.directory.path().join("qchain.toml"))
        .args(["--json", "list", "--records"])
        .arg(&rows)
        .output()
        .unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let served = Served::start(&world);
    // The same as the command line tells.
    let page = served.get("/v1/chains").is(200);
    let facts = |document: &Value| -> Vec<Value> {
        let chains = document["chains"].as_array().unwrap().iter();
        chains.map(|one| json!([one["members"], one["pinned_bytes"], one["merge_frees_bytes"]])).collect()
    };
    let (here, there) = (facts(&page), facts(&listed));
    assert!(here.len() == 3 && here.iter().all(|chain| there.contains(chain)), "{here:?}\n{there:?}");
    assert_eq!(page["rows_missing"], Value::Null);
    let sum = |key: &str| -> u64 {
        page["chains"].as_array().unwrap().iter().filter_map(|chain| chain[key].as_u64()).sum()
    };
    assert!(sum("merge_frees_bytes") > 0 && sum("pinned_bytes") > 0, "{page}");
    let figures = String::from_utf8(served.get("/metrics").body).unwrap();
    assert!(
        figures.contains(&format!("qchain_pinned_bytes{{store=\"s1\"}} {}\n", sum("pinned_bytes"))),
        "{figures}"
    );
    // States by the rows' words, and by those for all of them.
    for (state, count) in
        [("ready", 2), ("settled", 2), ("hidden", 2), ("destroyed", 0), ("leaving", 1), ("allocated", 1)]
    {
        let chains = served.get(&format!("/v1/chains?state={state}")).is(200)["chains"].clone();
        assert_eq!(chains.as_array().unwrap().len(), count, "{state}: {chains}");
    }
    let browser = Browser::start();
    browser.look(1280, false);
    browser.open(&format!("http://{}/", served.address));
    browser.wait("document.activeElement.id === 'token'");
    browser.keys(&format!("{READ}{ENTER}"));
    browser.wait("document.querySelectorAll('.chain').length === 3");
    let shown = |name: &str| {
        browser.run(&format!(
            "const {{ kind, held }} = document.querySelector(\"{}\").dataset; return `${{kind}} ${{held}}`",
            member(name)
        ))
    };
    assert_eq!(
        ["a", "c", LONG_NAMES[1], LONG_NAMES[2], LONG_NAMES[4]].map(shown),
        ["settled false", "hidden true", "hidden true", "leaving true", "settled false"].map(Value::from)
    );
    let totals = browser.run("return document.getElementById('totals').innerText");
    let totals = totals.as_str().unwrap();
    for part in ["Held by deleted members", "Merging could free"] {
        assert!(totals.contains(part), "{totals}");
    }
    let said = browser.run("return document.getElementById('list').innerText");
    assert!(said.as_str().unwrap().contains("merging frees"), "{said}");
    pictures(&browser, "held");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn rows_that_cannot_be_read_are_missed_in_words() {
    let world = world();
    let rows = hide(&world);
    configure(&world, &format!("[schedule]\nrecords = {rows:?}\n"));
    std::fs::write(&rows, "no rows").unwrap();
    let served = Served::start(&world);
    for path in ["/v1/chains", "/v1/members"] {
        let page = served.get(path).is(200);
        assert!(page["rows_missing"].as_str().unwrap().contains("rows.tsv"), "{page}");
    }
    assert!(!String::from_utf8(served.get("/metrics").body).unwrap().contains("qchain_pinned_bytes{"));
    let browser = Browser::start();
    browser.look(400, true);
    browser.open(&format!("http://{}/", served.address));
    browser.wait("document.activeElement.id === 'token'");
    browser.keys(&format!("{READ}{ENTER}"));
    browser.wait("document.querySelectorAll('.chain').length === 3");
    let said = browser.run("return document.getElementById('trouble').innerText");
    assert!(said.as_str().unwrap().contains("rows.tsv"), "{said}");
}

#[test]
fn the_token_stays_in_the_tab_and_one_that_only_reads_changes_nothing() {
    let world = world();
    configure(&world, "");
    let served = Served::start(&world);
    let browser = Browser::start();
    browser.look(400, true);
    browser.open(&format!("http://{}/", served.address));
    browser.wait("document.activeElement.id === 'token'");
    browser.keys(&format!("{READ}{ENTER}"));
    browser.wait("document.querySelectorAll('.chain').length === 3");
    assert_eq!(
        browser.run("return [document.cookie, localStorage.length, location.search, location.hash]"),
        json!(["", 0, "", ""])
    );
    browser.run(&format!("document.querySelector(\"{}\").click()", member("b")));
    browser.wait("document.querySelector('#facts canvas')");
    browser.run("document.querySelector('#facts form').requestSubmit()");
    browser.wait("document.querySelector('#plan [role=alert]')");
    let said = browser.run("return document.getElementById('plan').innerText");
    assert!(said.as_str().unwrap().contains("operate is needed"), "{said}");
    browser.tab_to("#facts input");
    browser.keys(ESCAPE);
    browser.wait(&format!(
        "document.getElementById('detail').hidden && document.activeElement.matches(\"{}\")",
        member("b")
    ));
    // What is asked for is shown, and nothing else.
    browser.run("document.getElementById('state').value = 'leaving'; document.getElementById('filter').requestSubmit()");
    browser.wait("document.querySelectorAll('.chain').length === 1");
    browser.run(
        "document.getElementById('prefix').value = '<b>'; document.getElementById('filter').requestSubmit()",
    );
    browser.wait("document.querySelectorAll('.chain').length === 0");
    browser.run("document.getElementById('leave').click()");
    browser.wait("!document.getElementById('enter').hidden && sessionStorage.length === 0");
    assert!(browser.complaints().iter().all(|line| line.contains("403")), "only the refusal");
}

#[test]
fn its_files_are_given_to_anybody_and_may_do_little() {
    let world = World::forked();
    assert_eq!(world.run(&["init"]).0, 0);
    configure(&world, "");
    let served = Served::start(&world);
    for (path, kind) in
        [("/", "text/html"), ("/page/style.css", "text/css"), ("/page/main.js", "text/javascript")]
    {
        let answer = served.send_raw("GET", path, "", b"");
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.header("content-type").unwrap().starts_with(kind), "{path}");
        let policy = answer.header("content-security-policy").unwrap();
        for rule in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
            assert!(policy.contains(rule), "{policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("x-frame-options"), Some("DENY"));
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        let tag = answer.header("etag").unwrap();
        let again = served.send_raw("GET", path, &format!("If-None-Match: \"other\", W/{tag}\r\n"), b"");
        assert_eq!((again.status, again.body.len(), again.header("etag")), (304, 0, Some(tag)), "{path}");
        let other = served.send_raw("GET", path, "If-None-Match: \"other\"\r\n", b"");
        assert_eq!((other.status, &other.body), (200, &answer.body));
    }
    for path in ["/page/mod.rs", "/page/..%2fmod.rs", "/page/", "/page"] {
        assert_eq!(served.send_raw("GET", path, "", b"").is(404)["code"], "not-found", "{path}");
    }
}

#[test]
fn pages_of_a_map_are_the_map_and_the_debt_is_that_of_verify() {
    let world = world();
    configure(&world, "");
    let served = Served::start(&world);
    let (_, whole) = world.run(&["map", "c"]);
    let (mut runs, mut after) = (Vec::new(), Some(0));
    while let Some(from) = after {
        let page = served.get(&format!("/v1/map?member=c&limit=2&after={from}")).is(200);
        let some = page["runs"].as_array().unwrap();
        assert!(some.len() == 2 || (some.len() == 1 && page["next"].is_null()), "{page}");
        assert_eq!((&page["member"], &page["virtual_bytes"]), (&json!("snapshots/2/7/c"), &json!(10 << 20)));
        runs.extend(some.iter().cloned());
        after = page["next"].as_u64();
    }
    assert!(runs.len() > 4, "{runs:?}");
    assert_eq!(Value::from(runs), whole["runs"]);
    assert_eq!(served.get("/v1/map?member=c").is(200)["runs"], whole["runs"]);
    let beyond = served.get(&format!("/v1/map?member=c&after={}", u64::MAX)).is(200);
    assert_eq!((&beyond["runs"], &beyond["next"]), (&json!([]), &Value::Null));
    let (_, owed) = world.run(&["verify", "--debt"]);
    let found = served.get("/v1/debt").is(200);
    let plain = |list: &Value| -> Vec<Value> {
        let all = list.as_array().unwrap().iter();
        all.map(|one| json!([one["member"], one["adopted"], one["oldest_read"]])).collect()
    };
    assert_eq!(plain(&found["debt"]), plain(&owed["debt"]));
    assert_eq!(
        (&found["members"], &found["adopted"], &found["never_read"]),
        (&json!(10), &json!(3), &json!(0))
    );
    assert!(found["age_seconds"].is_u64(), "{found}");
    let one = served.get("/v1/debt?member=c&limit=1").is(200);
    assert_eq!((&one["members"], &one["debt"][0]["member"]), (&json!(1), &json!("snapshots/2/7/c")));
    for (path, status) in [
        ("/v1/map", 400),
        ("/v1/map?member=c&limit=0", 400),
        ("/v1/map?member=c&limit=10001", 400),
        ("/v1/map?member=snapshots/", 400),
        ("/v1/map?member=nobody", 404),
        ("/v1/map?member=orphan", 422),
        ("/v1/debt?limit=1001", 400),
        ("/v1/debt?member=nobody", 404),
    ] {
        assert_eq!(served.get(path).status, status, "{path}");
    }
    for path in ["/v1/map?member=c", "/v1/debt"] {
        assert_eq!(served.send_raw("GET", path, "", b"").status, 401, "{path}");
    }
}
