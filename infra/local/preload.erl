%% SPDX-License-Identifier: Apache-2.0
%% Loads the modules of RabbitMQ, of its plugins and of all that these use, in one step, before RabbitMQ is started.
%% Its start loads every one of them anyway, one by one: a look into a hundred folders and a copy of the table of all
%% functions for each, together a third of the start's processor time.
App = fun(Name) ->
    case code:where_is_file(atom_to_list(Name) ++ ".app") of
        non_existing -> {"", []};
        File -> {ok, [{application, Name, Keys}]} = file:consult(File), {filename:dirname(File), Keys}
    end
end,
Closure = fun
    More([], Found) -> Found;
    More([Name | Rest], Found) when is_map_key(Name, Found) -> More(Rest, Found);
    More([Name | Rest], Found) ->
        {_, Keys} = Read = App(Name),
        More(proplists:get_value(applications, Keys, []) ++ Rest, Found#{Name => Read})
end,
{ok, [Plugins]} = file:consult("enabled_plugins"),
Modules = [{Module, filename:join(Folder, atom_to_list(Module) ++ ".beam")}
    || {Folder, Keys} <- maps:values(Closure([rabbit | Plugins], #{})),
       Module <- proplists:get_value(modules, Keys, []), not erlang:module_loaded(Module)],
Files = [{Module, File, Code} || {Module, File} <- Modules, {ok, Code} <- [prim_file:read_file(File)]],
Prepared = case code:prepare_loading(Files) of
    {ok, All} -> All;
    {error, Errors} -> % those that bring native code with them are for RabbitMQ's start to load
        {ok, Most} = code:prepare_loading([Each || {Module, _, _} = Each <- Files, not proplists:is_defined(Module, Errors)]),
        Most
end,
code:finish_loading(Prepared).
