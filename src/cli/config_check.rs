//! `qchain config check`: what is understood of the configuration.

use serde::Serialize;

use super::context::Context;
use super::error::{Exit, Result};
use super::settings::Settings;

/// The arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Check it, and print it with all defaults
    Check,
}

#[derive(Serialize)]
struct Understood<'a> {
    file: Option<String>,
    config: &'a Settings,
    stores: Vec<StoreOfCall<'a>>,
}

/// A store as this call would use it.
#[derive(Serialize)]
struct StoreOfCall<'a> {
    id: &'a str,
    path: &'a str,
    url: Option<String>,
    prefixes: Vec<String>,
}

/// Prints what is understood.
pub fn run(context: &Context, args: &Args) -> Result<Exit> {
    let Action::Check = args.action;
    let file = context.config_file.as_ref().map(|file| file.display().to_string());
    let stores = context.configs().iter().map(|config| {
        let url = config.url.as_ref();
        let hosts = url.into_iter().map(crate::cloudstack::prefix::StoreUrl::host_prefix);
        let virtual_machines = url.and_then(crate::cloudstack::prefix::StoreUrl::system_vm_prefix);
        let prefixes = hosts.chain(virtual_machines).chain(config.aliases.iter().cloned()).collect();
        let (id, path) = (config.id.as_str(), config.root.as_str());
        StoreOfCall { id, path, url: url.map(ToString::to_string), prefixes }
    });
    let understood = Understood { file, config: &context.settings, stores: stores.collect() };
    context.print(&understood, |out| {
        match &understood.file {
            Some(file) => writeln!(out, "# {file}, with all defaults")?,
            None => writeln!(out, "# there is no configuration file; these are the defaults")?,
        }
        let text = toml::to_string(&context.settings).map_err(std::io::Error::other)?;
        out.write_all(text.as_bytes())?;
        for store in &understood.stores {
            writeln!(out, "# store {} at {}; backing names may begin with:", store.id, store.path)?;
            for prefix in &store.prefixes {
                writeln!(out, "#   {prefix}")?;
            }
        }
        Ok(())
    })?;
    Ok(Exit::DONE)
}
